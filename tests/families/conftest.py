import pytest

from cases import CASES, Made


@pytest.fixture(scope="session", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Every case in turn."""
    case = CASES[request.param]
    return Made(request.param, case, case.write(tmp_path_factory.mktemp("case")))
