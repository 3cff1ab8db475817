"""ipywidgets in their last form."""

from __future__ import annotations

from typing import Any

from nbaccel.session.panel.widgets import widget_html, widget_text
from tests.session.panel.test_panel_html import Tags

STATES: dict[str, dict[str, Any]] = {
    "box": {"_model_name": "VBoxModel", "children": ["IPY_MODEL_row", "IPY_MODEL_bar", "IPY_MODEL_gone"]},
    "row": {"_model_name": "HBoxModel", "children": ["IPY_MODEL_slider", "IPY_MODEL_button", "IPY_MODEL_of"]},
    "slider": {"_model_name": "IntSliderModel", "description": "level", "min": 0, "max": 8, "value": 6},
    "button": {"_model_name": "ButtonModel", "description": "go <on>"},
    "of": {"_model_name": "DropdownModel", "_options_labels": ["a", "b"], "index": 1, "description": "of"},
    "bar": {"_model_name": "FloatProgressModel", "min": 0.0, "max": 1.0, "value": 0.123456789},
    "text": {"_model_name": "TextModel", "value": "<script>alert(1)</script>"},
    "check": {"_model_name": "CheckboxModel", "value": True, "description": "sure"},
    "image": {"_model_name": "ImageModel", "value": b"abc", "format": "png"},
    "output": {"_model_name": "OutputModel", "outputs": []},
    "printed": {
        "_model_name": "OutputModel",
        "outputs": ({"output_type": "stream", "name": "stdout", "text": "<loss> 3\n"},),
    },
    "password": {"_model_name": "PasswordModel", "value": "hush", "description": "token"},
    "upload": {
        "_model_name": "FileUploadModel",
        "description": "Upload",
        "value": [{"name": "key.pem", "size": 4}, {"name": "b.csv", "content": b"hush"}],
    },
    "nested": {"_model_name": "BoxModel", "children": ["IPY_MODEL_nested"]},
}


def test_boxes_hold_what_is_in_them() -> None:
    words = Tags(widget_html("box", STATES)).words
    assert words == "level  6go <on>of b 0.123457"
    assert "width:75.0%" in widget_html("box", STATES)
    assert widget_text("box", STATES) == "level: 6, go <on>, of: b, 0.123457"


def test_values_of_each_kind_are_shown() -> None:
    assert "&lt;script&gt;" in widget_html("text", STATES)
    assert "✓" in widget_html("check", STATES)
    assert 'src="data:image/png;base64,YWJj"' in widget_html("image", STATES)
    assert widget_html("unknown", STATES) == ""
    assert widget_text("unknown", STATES) == ""


def test_password_is_not_shown_and_of_files_only_their_names() -> None:
    assert Tags(widget_html("password", STATES)).words == "token ••••"
    assert widget_text("password", STATES) == "token: ••••"
    assert Tags(widget_html("upload", STATES)).words == "Upload key.pem, b.csv"


def test_output_is_what_was_put_into_it() -> None:
    assert (widget_html("output", STATES), widget_text("output", STATES)) == ("", "")
    assert widget_html("printed", STATES) == "<pre>&lt;loss&gt; 3\n</pre>"
    assert widget_text("printed", STATES) == "<loss> 3\n"


def test_box_that_holds_itself_ends() -> None:
    assert Tags(widget_html("nested", STATES)).tags == {"div"}
    assert widget_text("nested", STATES) == ""
