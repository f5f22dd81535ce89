"""Is this machine, and what a config names, fit for the work? One line a check, and what to do where it fails."""
