"""The library's own test suites, from its source package, with stock Qwen2.5-VL as the control.

.ci/library_tests unpacks the package's tests as `transformers_tests` and runs the files beside this
one. A suite is a mixin of the library; a class here binds one to a class of ours and names in
`stock` the same suite bound to Qwen2.5-VL's. A test fails only where stock passes it.
"""

import contextlib
import functools
import sys
import tempfile
import types
import unittest
from pathlib import Path

from PIL import Image

from clips import frame_image, write_clip
from exceptions import EXCEPTIONS


def stand_in(name, **content):
    """A module that the suites import and the package leaves out."""
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


class ExportTesterMixin:
    """Of exporting, which is not in the package."""


class GenerationTesterMixin:
    """Of generation, which is not in the package."""


@functools.cache
def local_path(address):
    """A picture or a clip of our own in place of one that the suites have on the Hub."""
    name = address.rsplit("/", 1)[-1]
    path = Path(tempfile.mkdtemp()) / name
    if name.endswith((".png", ".jpg")):
        Image.fromarray(frame_image(1, 120, 160)).save(path)
    elif name.endswith(".mp4"):
        write_clip(path, 11, rate=25)
    return str(path)


stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
stand_in("transformers_tests.utils.test_configuration_utils", config_common_kwargs={})
stand_in("fetch_hub_objects_for_ci", url_to_local_path=local_path)


class AgainstStock:
    """Comes first among the bases of a suite for a class of ours."""

    stock: type[unittest.TestCase]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in unittest.defaultTestLoader.getTestCaseNames(cls):
            test = against_stock(getattr(cls, name))
            if name in EXCEPTIONS:
                test = unittest.expectedFailure(test)
            setattr(cls, name, test)

    def subTest(self, *args, **kwargs):
        # The first failure ends the test, so that stock can be asked about it.
        return contextlib.nullcontext()


def against_stock(test):
    """The test, skipped where it fails and stock does not pass it either."""

    @functools.wraps(test)
    def run(self):
        try:
            test(self)
        except unittest.SkipTest:
            raise
        except Exception:
            control = unittest.TestResult()
            unittest.TestSuite([self.stock(self._testMethodName)]).run(control)
            if control.skipped or not control.wasSuccessful():
                self.skipTest("stock Qwen2.5-VL does not pass it")
            raise

    return run
