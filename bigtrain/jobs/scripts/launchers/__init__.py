"""One file for each launcher whose scripts run on bigtrain's agents."""
