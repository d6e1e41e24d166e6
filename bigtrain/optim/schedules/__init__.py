"""The schedules: one file each, named by `schedule.name`."""
