"""`python -m polymerge`: the command line where no script is on the PATH."""

from polymerge.cli import main

if __name__ == "__main__":  # a worker process imports this file again
    main()
