"""Sheets of samples that one can read: pictures in rows with their text beneath, and text alone."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from tfusion.requests import Generation, Request

PADDING_PX = 8
TEXT_PX = 12
SMALL_TEXT_PX = 11
TITLE_PX = 14
LARGEST_PX = 256  # a larger picture is reduced to this side
MOST_LINES = 6  # under a picture; the whole text is in the .jsonl beside the sheet
TEXT_WIDTH_PX = 640
BLACK, GREY = "#111111", "#666666"


def draw_grid(
    items: Sequence[tuple[str, PILImage.Image]], columns: int = 8, cell_px: int = 96, title: str = ""
) -> PILImage.Image:
    """Pictures in rows of `columns`, each with its text wrapped beneath it.

    Args:
        items: text and picture, in reading order.
        columns: pictures a row, at most.
        cell_px: small pictures are enlarged, by a whole factor and without smoothing, to at least this side.
        title: a line above, or nothing.
    """
    font = ImageFont.load_default(size=TEXT_PX)
    pictures = [_fit(picture, cell_px) for _, picture in items]
    cell = max([cell_px, *(picture.width for picture in pictures)])
    labels = [_clip(wrap(text, font, cell)) for text, _ in items]
    rows = [range(i, min(i + columns, len(items))) for i in range(0, len(items), columns)]
    line_px = TEXT_PX + 3
    heights = [max(pictures[i].height + 4 + line_px * len(labels[i]) for i in row) for row in rows]

    width = PADDING_PX + min(columns, max(1, len(items))) * (cell + PADDING_PX)
    header = _text_block([(title, BLACK)], width, TITLE_PX) if title else None
    top = header.height if header else 0
    sheet = PILImage.new("RGB", (width, top + PADDING_PX + sum(h + PADDING_PX for h in heights)), "white")
    if header:
        sheet.paste(header, (0, 0))
    draw, y = ImageDraw.Draw(sheet), top + PADDING_PX
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = PADDING_PX + column * (cell + PADDING_PX)
            sheet.paste(pictures[i], (x, y))
            draw.rectangle((x - 1, y - 1, x + pictures[i].width, y + pictures[i].height), outline="#dddddd")
            for n, line in enumerate(labels[i]):
                draw.text((x, y + pictures[i].height + 4 + n * line_px), line, fill=BLACK, font=font)
        y += height + PADDING_PX
    return sheet


def draw_sheet(
    requests: Sequence[Request],
    generations: Sequence[Generation],
    title: str,
    answers: dict[int, str] | None = None,
    attribution: str = "",
    columns: int = 8,
) -> PILImage.Image:
    """Samples in three parts: pictures made, pictures given with what was written about them, text alone.

    Args:
        requests: `generation.request` is an index into them.
        generations: what was made.
        title: a line at the top.
        answers: the true text for a request that gives a picture, by index; drawn beneath the written one.
        attribution: of the pictures shown; small, at the bottom.
        columns: pictures a row, at most.
    """
    made, named, texts = [], [], []
    for generation in generations:
        request = requests[generation.request]
        prompt, written = text_of(request.segments), text_of(generation.segments)
        new_pictures, given = pictures_of(generation.segments), pictures_of(request.segments)
        if new_pictures:
            label = prompt + (f"\n+ {written}" if written else "")
            made += [(label, picture) for picture in new_pictures]
        elif given:
            answer = (answers or {}).get(generation.request)
            named.append((written + (f"\n(true: {answer})" if answer else ""), given[-1]))
        else:
            texts += [(prompt, GREY), (written, BLACK), ("", GREY)]
    parts = [_text_block([(title, BLACK)], TEXT_WIDTH_PX, TITLE_PX)]
    if made:
        parts.append(draw_grid(made, columns, title="Pictures made from the text beneath them"))
    if named:
        parts.append(draw_grid(named, columns, title="Text written about the pictures given"))
    width = max(TEXT_WIDTH_PX, *(part.width for part in parts))
    if texts:
        parts.append(_text_block([("Text written (the opening, given, in grey)", BLACK)], width, TITLE_PX))
        parts.append(_text_block(texts, width, TEXT_PX))
    if attribution:
        parts.append(_text_block([(attribution, GREY)], width, SMALL_TEXT_PX))
    sheet = PILImage.new("RGB", (width, sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    return sheet


def attribution_of(datamodule: object) -> str:
    """What the image corpora ask to be written where their pictures appear: their `attribution`, if any."""
    corpora = getattr(datamodule, "image_corpora", None) or []
    lines = [getattr(corpus, "attribution", "") for corpus in corpora]
    return "\n".join(dict.fromkeys(line for line in lines if line))


def wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width_px: float) -> list[str]:
    """Lines of `text` no wider than `width_px`; its own line ends are kept, too long words are cut."""
    lines = []
    for paragraph in text.expandtabs(4).splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width_px:
                line = longer
                continue
            if line:
                lines.append(line)
            while len(word) > 1 and font.getlength(word) > width_px:
                fits = max(1, next(n for n in range(len(word) + 1) if font.getlength(word[: n + 1]) > width_px))
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    return lines


def _clip(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1] + "..."]


def _text_block(paragraphs: Sequence[tuple[str, str]], width: int, size: int) -> PILImage.Image:
    """Paragraphs of (text, colour), wrapped to `width` pixels, on white."""
    font = ImageFont.load_default(size=size)
    lines = [(line, color) for text, color in paragraphs for line in wrap(text, font, width - 2 * PADDING_PX)]
    block = PILImage.new("RGB", (width, PADDING_PX + len(lines) * (size + 4)), "white")
    draw = ImageDraw.Draw(block)
    for n, (line, color) in enumerate(lines):
        draw.text((PADDING_PX, PADDING_PX + n * (size + 4)), line, fill=color, font=font)
    return block


def _fit(picture: PILImage.Image, cell_px: int) -> PILImage.Image:
    picture = picture.convert("RGB")
    side = max(picture.size)
    if side < cell_px:
        factor = -(-cell_px // side)
        return picture.resize((picture.width * factor, picture.height * factor), PILImage.Resampling.NEAREST)
    if side > LARGEST_PX:
        picture.thumbnail((LARGEST_PX, LARGEST_PX), PILImage.Resampling.LANCZOS)
    return picture


def text_of(segments: Sequence[str | PILImage.Image]) -> str:
    """All text among segments."""
    return "".join(segment for segment in segments if isinstance(segment, str)).strip()


def pictures_of(segments: Sequence[str | PILImage.Image]) -> list[PILImage.Image]:
    """All pictures among segments."""
    return [segment for segment in segments if not isinstance(segment, str)]
