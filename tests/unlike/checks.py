from unlike import Unlike

from mmtok_cli.methods.testing import MethodTests


class TestUnlike(MethodTests):
    method = Unlike(pivots=2)
