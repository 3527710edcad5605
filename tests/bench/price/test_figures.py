"""What the figures of the priced models name: kinds that no bar shows share a key, which says by what rule."""

from bench.price.figures import KIND_COLOURS, _parts


def parts(*bars):
    runs = [{"cost": sum(bar.values()), "cost_by_kind": bar} for bar in bars]
    return {name: kinds for name, (_, kinds) in _parts({"runs": runs}).items()}


def test_a_kind_has_its_own_colour_from_one_per_cent_of_any_bar_on():
    few = {"row": 995, "token": 5}
    assert "token" in parts(few, {"weight": 9900, "token": 100}) and "token" not in parts(few)
    assert parts(few)["row"] == ["row"]
    rest = [kind for kind in KIND_COLOURS if kind != "row"]
    assert parts(few)[f"under 1 % of every bar: {', '.join(rest)}"] == rest


def test_where_every_kind_is_seen_none_is_grouped():
    assert list(parts(dict.fromkeys(KIND_COLOURS, 10))) == list(KIND_COLOURS)
