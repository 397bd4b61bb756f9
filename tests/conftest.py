import importlib.util, os, shutil
from pathlib import Path
import pandas as pd, pytest
os.environ.setdefault('MPLBACKEND', 'Agg')

def _challenge(name):
    "A table of the challenge that the wheel of torchxrayvision carries; the package is located, never imported"
    return pd.read_csv(Path(importlib.util.find_spec('torchxrayvision').submodule_search_locations[0])/'data'/name)

@pytest.fixture(scope='session')
def browser():
    "A headless Chromium"
    exe = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not exe: pytest.skip('no Chromium here (Debian: apt-get install chromium)')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox','--disable-gpu','--no-first-run','--disable-background-networking','--disable-component-update','--disable-sync'])
        yield b
        b.close()

@pytest.fixture(scope='session')
def challenge_labels():
    "All label rows of the challenge"
    return _challenge('kaggle_stage_2_train_labels.csv.zip')

@pytest.fixture(scope='session')
def challenge_headers():
    "Age, sex, view and spacing of all its images"
    return _challenge('kaggle_stage_2_train_images_dicom_headers.csv.gz')

@pytest.fixture(scope='session')
def challenge_boxes(challenge_labels):
    "Its 9,555 boxes in pixels of 1024, (n,4)"
    import torch
    from lungdet.boxes import xywh2xyxy
    df = challenge_labels[challenge_labels.Target==1]
    return xywh2xyxy(torch.tensor(df[['x','y','width','height']].to_numpy(), dtype=torch.float32))
