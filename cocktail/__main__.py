"""`python -m cocktail`: the same as `python -m cocktail.run`, and as the installed command."""

import sys

from cocktail.run import main

if __name__ == "__main__":
    sys.exit(main())
