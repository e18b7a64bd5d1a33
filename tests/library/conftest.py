"""Stand-ins for what the library's suites import and its source package leaves out.

pytest reads this file before those that import the suites.
"""

import functools
import sys
import tempfile
import types
from pathlib import Path

from PIL import Image

from clips import frame_image, write_clip


def stand_in(name, **content):
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


@functools.cache
def local_path(address):
    """A picture or a clip of our own in place of one that the suites have on the Hub."""
    path = Path(tempfile.mkdtemp()) / address.rsplit("/", 1)[-1]
    if path.suffix in (".png", ".jpg"):
        Image.fromarray(frame_image(1, 120, 160)).save(path)
    elif path.suffix == ".mp4":
        write_clip(path, 11, rate=25)
    return str(path)


suites = "transformers_tests"
stand_in(f"{suites}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
stand_in(
    f"{suites}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {})
)
stand_in(f"{suites}.utils.test_configuration_utils", config_common_kwargs={})
stand_in("fetch_hub_objects_for_ci", url_to_local_path=local_path)
