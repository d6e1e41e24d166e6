"""Sweeps of small runs for a scaling law: ladders of sizes, plans, trials with shared trunks, the journal."""
