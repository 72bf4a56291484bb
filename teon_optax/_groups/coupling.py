"""The modes: how K matrices of a group become one joint matrix, and again K."""


def joint_shape(K: int, fan_in: int, fan_out: int, mode: int) -> tuple[int, int]:
    """Shape of the mode's unfolding of K matrices (fan_in, fan_out), up to a transposition.

    The paper's W is (fan_out, fan_in), so its mode 1, which shares fan_out, joins kernels along
    fan_in.
    """
    unfoldings = {1: (K * fan_in, fan_out), 2: (fan_in, K * fan_out), 3: (K, fan_in * fan_out)}
    return unfoldings[mode]
