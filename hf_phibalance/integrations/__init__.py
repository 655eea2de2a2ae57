"""φ-balancing in tools that people train or serve with from a YAML or a command line. One module per tool; each imports its tool."""
