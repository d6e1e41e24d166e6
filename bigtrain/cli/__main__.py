"""`python -m bigtrain.cli`."""

from bigtrain.cli import main

if __name__ == "__main__":
    main()
