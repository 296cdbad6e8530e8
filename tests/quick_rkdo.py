"""`rkdo` with an encoder that trains in no time: for what happens to processes."""

import sys

import pytest
from runs import quicken

from rkdo.__main__ import main

if __name__ == "__main__":
    quicken(pytest.MonkeyPatch())
    sys.exit(main())
