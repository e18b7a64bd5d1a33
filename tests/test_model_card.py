"""The card of a checkpoint that was made from another tells its true base and no local path."""

import pytest
from huggingface_hub import metadata_load

from commands.model_card import base_model, find_file, write_card

QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"


def write_readme(folder, metadata):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Name\n", encoding="utf-8")
    return folder


def made_from(source, out, **settings):
    """The metadata and text of a card for `out`."""
    out.mkdir()
    write_card(out, out.name, source, "**Tuned.**", **settings)
    return metadata_load(out / "README.md"), (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        (f"base_model: {QWEN}", QWEN),
        (f"base_model:\n- {QWEN}\n- other/one", QWEN),
        ("license: mit", None),
        ("base_model: /home/me/models/qwen", None),
        ("base_model: ../qwen", None),
        ("base_model: []", None),
    ],
)
def test_a_folder_is_made_from_what_its_card_names(tmp_path, metadata, base):
    source = write_readme(tmp_path / "source", metadata)
    assert base_model(source) == base
    card, text = made_from(source, tmp_path / "out")
    assert card.get("base_model") == base
    assert str(tmp_path) not in text


def test_a_folder_of_the_hubs_cache_and_an_id_name_themselves(tmp_path):
    snapshot = tmp_path / "models--me--VideoNSA-7B/snapshots/0123abc"
    write_readme(snapshot, f"base_model: {QWEN}")
    assert base_model(snapshot) == base_model("me/VideoNSA-7B") == "me/VideoNSA-7B"


def test_a_config_names_the_base_where_the_card_does_not(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(f'{{"_name_or_path": "{QWEN}"}}')
    assert base_model(tmp_path) == QWEN
    for local in ("runs/checkpoint-100", "/home/me/Qwen", "./Qwen/Qwen2.5-VL-7B-Instruct"):
        config.write_text(f'{{"_name_or_path": "{local}"}}')
        assert base_model(tmp_path) is None
    write_readme(tmp_path, "base_model: other/one")
    config.write_text(f'{{"_name_or_path": "{QWEN}"}}')
    assert base_model(tmp_path) == "other/one"


def test_a_folder_without_a_card_has_no_base(tmp_path):
    card, _ = made_from(tmp_path, tmp_path / "out")
    assert "base_model" not in card
    assert (card["license"], card["license_name"]) == ("other", "as-the-source")


def test_licence_data_and_use_stand_in_the_card(tmp_path):
    terms = "license: other\nlicense_name: qwen-research\nlicense_link: https://example.org/LICENSE"
    source = write_readme(tmp_path / "source", terms)
    card, text = made_from(source, tmp_path / "out", datasets=["me/clips"])
    assert card["license_name"] == "qwen-research"
    assert card["license_link"] == "https://example.org/LICENSE"
    assert card["datasets"] == ["me/clips"]
    assert "**Tuned.**" in text and 'from_pretrained("out", trust_remote_code=True)' in text


def test_papers_are_not_read_through_links_out_of_the_folder(tmp_path):
    (tmp_path / "secret").write_text("secret")
    source = write_readme(tmp_path / "source", "license: mit")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    assert find_file(source, "README.md") == source / "README.md"
    with pytest.raises(ValueError, match="LICENSE of .* leads to .*secret, outside"):
        find_file(source, "LICENSE")


def test_a_card_that_cannot_be_read_is_not_passed_over(tmp_path):
    source = write_readme(tmp_path / "source", "license: [")
    with pytest.raises(ValueError, match="metadata of .* are not YAML"):
        made_from(source, tmp_path / "out")
