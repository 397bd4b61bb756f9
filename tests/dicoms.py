"DICOMs made in memory, for the tests of chapters 02 to 02c"
import cv2, numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit

def stored(a, bits=None, kind='MONOCHROME2', **header):
    ds = Dataset()
    ds.set_pixel_data(a, kind, bits or 8*a.itemsize, generate_instance_uid=False)
    for k,v in header.items(): setattr(ds, k, v)
    return ds

def jpeg(a, quality=90, photometric='MONOCHROME2', **header):
    "A DICOM with `a` as baseline JPEG"
    ds = stored(a, kind='RGB' if a.ndim==3 else photometric, **header)
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    if a.ndim==3: ds.PhotometricInterpretation = 'YBR_FULL_422'
    code = cv2.imencode('.jpg', a[...,::-1] if a.ndim==3 else a, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    ds.PixelData = encapsulate([code.tobytes()])
    ds['PixelData'].VR = 'OB'
    return ds

def save(ds, path):
    ds.SOPClassUID, ds.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.7', '1.2.3'
    ds.save_as(path, enforce_file_format=True)
    return path

def chest(n=256):
    "Something smooth with a little texture, uint8 (n,n)"
    y,x = np.mgrid[-1:1:n*1j,-1:1:n*1j]
    return np.clip(130+80*np.cos(3*x)*np.sin(2*y)+np.random.default_rng(1).normal(0,6,(n,n)), 0, 255).astype(np.uint8)
