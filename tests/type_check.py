"""The checker of annotations that the test run installs: beartype, with an int taken for a float."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
