from dart import Dart

from mmtok_cli.methods.testing import MethodTests


class TestDart(MethodTests):
    method = Dart(pivots=2)
