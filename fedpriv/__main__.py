"""Entry point of `python -m fedpriv`, which is the same as `fedpriv`."""

from fedpriv.cli import main

if __name__ == "__main__":
    main()
