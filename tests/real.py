"Where the real data is, for the tests that use it; they skip, visibly, without it"
import os, pytest
from pathlib import Path

REAL = Path(os.environ.get('LUNGDET_REAL') or Path(__file__).resolve().parent.parent.parent/'shared'/'data')
needs_real = pytest.mark.skipif(not (REAL/'rsna').is_dir(), reason='no real data: set LUNGDET_REAL to its folder')
