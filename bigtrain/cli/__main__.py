"""`python -m bigtrain.cli`: the same as `python -m bigtrain`."""

from bigtrain.__main__ import main

if __name__ == "__main__":
    main()
