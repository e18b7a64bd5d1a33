"""The library's own test suites, from its source package, with stock Qwen2.5-VL as the control.

.ci/library_tests unpacks the package's tests as `transformers_tests` and runs the files beside this
one. A suite is a mixin of the library; a class here binds one to a class of ours and names in
`stock` the same suite bound to Qwen2.5-VL's. A test fails only where stock passes it.
"""

import contextlib
import functools
import unittest

from exceptions import EXCEPTIONS


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
