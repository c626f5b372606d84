"""Log Z without sampling: closed forms, quadrature, sums over finite supports."""

__all__: list[str] = []
