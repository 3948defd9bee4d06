"""``python -m fastscore``."""

from fastscore.cli import main

if __name__ == "__main__":
    main()
