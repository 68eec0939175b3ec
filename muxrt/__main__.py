"""`python -m muxrt`."""

from muxrt.cli.main import main

if __name__ == "__main__":
    main()
