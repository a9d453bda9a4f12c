"""Linear regions of graphs: what is linear, where it begins and ends, and how it is computed most cheaply."""
