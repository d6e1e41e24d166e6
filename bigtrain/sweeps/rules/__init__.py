"""The rules that compute a quantity of a trial from its size: one file each, selected by `ladder.KEY.name`."""
