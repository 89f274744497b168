"""Draw the sample pictures in this folder.

  python examples/samples/draw.py

The pictures belong to this project; use them as you like.
"""

import os
from collections.abc import Callable

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter

_SIZE = 256
_SCALE = 4  # drawn larger, then reduced, for smooth edges

Draw = PIL.ImageDraw.ImageDraw
Colour = tuple[int, int, int]


def main() -> None:
  folder = os.path.dirname(os.path.abspath(__file__))
  for name, (top, bottom, draw) in PICTURES.items():
    picture = gradient(top, bottom)
    draw(PIL.ImageDraw.Draw(picture))
    picture = picture.filter(PIL.ImageFilter.GaussianBlur(_SCALE))
    picture = picture.resize((_SIZE, _SIZE), PIL.Image.Resampling.LANCZOS)
    picture.save(os.path.join(folder, f'{name}.jpg'), quality=85)


def gradient(top: Colour, bottom: Colour) -> PIL.Image.Image:
  """Return a large picture that fades from one colour to another."""
  column = PIL.Image.new('RGB', (1, 2))
  column.putpixel((0, 0), top)
  column.putpixel((0, 1), bottom)
  side = _SIZE * _SCALE
  return column.resize((side, side), PIL.Image.Resampling.BILINEAR)


def polygon(draw: Draw, points: list[tuple[int, int]], colour: str) -> None:
  """Draw a polygon; points are in pixels of the final picture."""
  draw.polygon([(_SCALE * x, _SCALE * y) for x, y in points], fill=colour)


def box(
  draw: Draw, left: int, top: int, right: int, bottom: int, colour: str
) -> None:
  corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
  polygon(draw, corners, colour)


def disc(draw: Draw, x: int, y: int, radius: int, colour: str) -> None:
  oval(draw, x, y, radius, radius, colour)


def oval(
  draw: Draw, x: int, y: int, width: int, height: int, colour: str
) -> None:
  """Draw an ellipse around (x, y) with given half axes."""
  corners = (x - width, y - height, x + width, y + height)
  draw.ellipse([_SCALE * c for c in corners], fill=colour)


def ship(draw: Draw) -> None:
  box(draw, 0, 160, 256, 256, '#2b5d86')  # sea
  polygon(draw, [(20, 140), (236, 140), (212, 186), (48, 186)], '#7c2f2a')
  polygon(draw, [(20, 132), (238, 132), (236, 142), (20, 142)], '#e8e8e8')
  box(draw, 76, 96, 188, 132, '#f2f2f0')  # deckhouse
  box(draw, 96, 70, 160, 98, '#dcdcda')
  for x in range(86, 184, 20):
    box(draw, x, 106, x + 10, 116, '#40566b')
  box(draw, 112, 40, 134, 72, '#c94a3a')  # funnel
  box(draw, 112, 40, 134, 48, '#222222')
  box(draw, 204, 76, 207, 132, '#555555')  # mast
  for x in range(0, 256, 32):
    oval(draw, x + 10, 192, 18, 3, '#c7d9e6')  # bow wave and foam


def airplane(draw: Draw) -> None:
  oval(draw, 52, 62, 40, 14, '#e9f1f7')  # clouds
  oval(draw, 204, 206, 46, 15, '#e9f1f7')
  polygon(draw, [(112, 128), (52, 196), (80, 196), (156, 132)], '#9aa6b2')
  polygon(draw, [(122, 118), (84, 62), (106, 62), (164, 116)], '#aeb9c4')
  polygon(draw, [(40, 122), (22, 78), (40, 78), (66, 118)], '#3a6ea8')
  polygon(draw, [(44, 128), (18, 144), (34, 146), (70, 132)], '#8f9ba7')
  oval(draw, 130, 124, 96, 15, '#f4f6f8')  # fuselage
  oval(draw, 214, 121, 9, 6, '#33475a')  # cockpit
  for x in range(70, 200, 14):
    disc(draw, x, 120, 2, '#51677c')
  oval(draw, 104, 152, 13, 7, '#66727d')  # engine


def truck(draw: Draw) -> None:
  box(draw, 0, 190, 256, 256, '#6d6a66')  # road
  box(draw, 0, 216, 256, 220, '#d9d4c5')
  box(draw, 18, 72, 166, 182, '#e9e4da')  # cargo box
  box(draw, 18, 72, 166, 82, '#c23b2e')
  box(draw, 18, 172, 236, 186, '#33322f')  # frame
  cab = [(172, 182), (172, 98), (212, 98), (236, 138), (236, 182)]
  polygon(draw, cab, '#c23b2e')
  polygon(draw, [(182, 134), (182, 108), (206, 108), (222, 134)], '#b7d2e2')
  box(draw, 228, 150, 238, 162, '#f5e6a0')  # headlight
  for x in (56, 98, 204):
    disc(draw, x, 190, 21, '#1e1d1b')
    disc(draw, x, 190, 9, '#a9a7a2')


def frog(draw: Draw) -> None:
  oval(draw, 128, 224, 112, 20, '#4d6b39')  # leaf
  oval(draw, 60, 182, 34, 26, '#3f7d2c')  # hind legs
  oval(draw, 196, 182, 34, 26, '#3f7d2c')
  oval(draw, 128, 164, 72, 56, '#57a03c')  # body
  oval(draw, 128, 186, 50, 34, '#cfdc9b')  # belly
  oval(draw, 128, 118, 62, 40, '#5fac42')  # head
  for x in (88, 168):
    disc(draw, x, 84, 21, '#5fac42')
    disc(draw, x, 82, 14, '#f0d95c')
    oval(draw, x, 82, 9, 5, '#161616')
  oval(draw, 128, 136, 44, 4, '#2d5a20')  # mouth
  for x in (84, 172):
    oval(draw, x, 216, 20, 8, '#4b8f34')  # feet


def cat(draw: Draw) -> None:
  oval(draw, 128, 236, 92, 70, '#8b8078')  # body
  for side in (-1, 1):
    ear = [(128 + side * 74, 22), (128 + side * 70, 96), (128 + side * 22, 66)]
    polygon(draw, ear, '#8b8078')
    inner = [
      (128 + side * 66, 40),
      (128 + side * 62, 84),
      (128 + side * 36, 66),
    ]
    polygon(draw, inner, '#d8a39b')
  oval(draw, 128, 124, 76, 66, '#978b82')  # head
  for x in (112, 128, 144):
    polygon(draw, [(x - 4, 62), (x + 4, 62), (x, 92)], '#5f564f')  # stripes
  oval(draw, 128, 156, 38, 26, '#e6dfd6')  # muzzle
  for x in (96, 160):
    oval(draw, x, 118, 18, 14, '#c5d36b')
    oval(draw, x, 118, 5, 13, '#161616')
  polygon(draw, [(118, 142), (138, 142), (128, 153)], '#c9706b')  # nose
  for side in (-1, 1):
    for y in (150, 158, 166):
      start = (128 + side * 30, 158)
      end = (128 + side * 96, y + 3 * (y - 158))
      polygon(draw, [start, end, (end[0], end[1] + 2)], '#f7f4ef')  # whiskers


# Colours of the background's top and bottom, and what is in front of it.
PICTURES: dict[str, tuple[Colour, Colour, Callable[[Draw], None]]] = {
  'ship': ((150, 190, 220), (225, 232, 235), ship),
  'airplane': ((70, 130, 195), (170, 205, 230), airplane),
  'truck': ((160, 195, 220), (205, 205, 190), truck),
  'frog': ((96, 120, 70), (60, 84, 44), frog),
  'cat': ((190, 160, 130), (120, 92, 72), cat),
}

if __name__ == '__main__':
  main()
