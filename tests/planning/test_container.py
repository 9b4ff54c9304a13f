"""What a container leaves free, and models whose embedding is their head."""

from xplus_fast.model.layout import united
from xplus_fast.planning.from_recipe import container_memory


def test_a_containers_limit_counts(tmp_path):
    assert container_memory(tmp_path) is None  # no cgroup v2
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200\nfile 300\n")
    assert container_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_memory(tmp_path) == 1000 - 700 + 200
    (tmp_path / "memory.current").write_text("1300\n")
    assert container_memory(tmp_path) == 0


def test_a_tied_head_trains_with_the_embedding():
    assert united(("head",), tied=True) == ("head", "embedding")
    assert united(("embedding", "final_norm"), tied=True) == ("embedding", "final_norm", "head")
    assert united(("final_norm",), tied=True) == ("final_norm",)
    assert united(("head",), tied=False) == ("head",)
