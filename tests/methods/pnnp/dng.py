"""A DNG as tests write it: there is no photograph in it."""

import struct

import tifffile

CODES = {"R": 0, "G": 1, "B": 2}


def write_dng(path, pixels, pattern="RGGB", iso=800, black=512, white=16383, seconds=(1, 10), celsius=None):
    """Writes a mosaic `(height, width)` of uint16; a 6x6 pattern is of an X-Trans sensor, None of a linear file."""
    side = 2 if pattern is None else round(len(pattern) ** 0.5)
    tags = [
        (50706, "B", 4, (1, 4, 0, 0), True),  # DNG version
        (50708, "s", 0, "A camera that does not exist", True),
        (50714, "H", 1, black, True),
        (50717, "H", 1, white, True),
        (50728, "2I", 3, (1, 2, 1, 1, 1, 2), True),  # neutral: red and blue at half
        (34855, "H", 1, iso, True),
        (33434, "2I", 1, seconds, True),
    ]
    if pattern is not None:
        tags += [(33421, "H", 2, (side, side), True), (33422, "B", side**2, bytes(CODES[c] for c in pattern), True)]
        tags += [
            (50721, "2i", 9, (1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1), True),
            (50778, "H", 1, 21, True),
        ]
    if celsius is not None:
        tags.append((37888, "2i", 1, (celsius, 1), True))
    if pattern is not None or pixels.ndim == 3:
        tifffile.imwrite(path, pixels, photometric=34892 if pattern is None else 32803, extratags=tags)
        return
    # One colour only: tifffile would not call that linear, as a monochrome sensor's DNG is.
    tifffile.imwrite(path, pixels, photometric="minisblack", extratags=tags)
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].tags[262].valueoffset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<H", 34892))
