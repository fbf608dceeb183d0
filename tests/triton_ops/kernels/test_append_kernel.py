"""The kernel of append, held to the properties of the reference."""

from hypothesis import HealthCheck, given, settings

from tests.support.ops.append_cases import check, requests

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(request=requests())
def test_a_token_lies_behind_the_last_one_and_is_counted(request, device):
    check(request, device)
