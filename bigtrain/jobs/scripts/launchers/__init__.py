"""The supported launchers of scripts, one file each."""
