"""`python -m o2o` is the command `o2o`, for a Python whose scripts are not on the path."""

from o2o.cli import main

if __name__ == "__main__":
    main()
