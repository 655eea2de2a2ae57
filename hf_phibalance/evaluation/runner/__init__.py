"""The inside of the sandbox: what the two interpreters do that `sandbox.run_program` starts. Standard library only."""
