"""The simulator: runs a StageGraph in SimPy time on links that are shared."""
