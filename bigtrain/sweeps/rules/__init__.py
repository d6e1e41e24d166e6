"""The rules by which a quantity of a trial follows from its size: one file each, named by `ladder.KEY.name`."""
