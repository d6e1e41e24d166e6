"""The schedules: one file each, selected by `schedule.name`."""
