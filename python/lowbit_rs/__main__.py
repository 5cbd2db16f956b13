"""``python -m lowbit_rs``: the same as the command ``lowbit``."""

from lowbit_rs.cli import main

if __name__ == "__main__":
    main(prog_name="lowbit")
