"""The driver, which says that it is active."""

from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty):
        raise _not_interpreted()

    def get_current_target(self):
        raise _not_interpreted()

    def get_active_torch_device(self):
        raise _not_interpreted()

    def get_benchmarker(self):
        raise _not_interpreted()


def _not_interpreted():
    return RuntimeError("Triton has no compiler for this CPU: set TRITON_INTERPRET=1.")
