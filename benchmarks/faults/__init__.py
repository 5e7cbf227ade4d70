"""The fault benchmark: what the findings say of runs that are broken on purpose, and of healthy ones."""
