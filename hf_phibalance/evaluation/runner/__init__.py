"""
The inside of the sandbox: what the fresh interpreter does that `sandbox.run_program` starts. Standard library only.

Four processes, of which only the last one ever sees the program run:

    supervisor    reads the job, keeps the time, kills everything, reports the verdict
    ├── judge     executes the checks; their calls of the program's functions go over a pipe
    └── keeper    first process of the new namespaces; sets them up, reaps, and takes everything along when it dies
        └── program

Each has its file. They share `messages` (what they say to each other), `processes` (starting, finding and killing),
`isolation` (the walls around the program) and `linux` (calls of the kernel).

The interpreter imports this as the package `runner`, from bytecode and without the package around it. All of it is
imported here, since the program finds none of it on its path.
"""

from .messages import frame
from .supervisor import main


__all__ = ["frame", "main"]
