"""Generated speech-like audio: words of a few sounds, spoken by many voices, in noise and babble.

A source-filter synthesiser in the manner of Klatt (1980), with sums of harmonics for the voice and bands of
noise for hisses and bursts. Formant frequencies are the textbook averages (Peterson and Barney, 1952), scaled
by voice. Everything depends on the seed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

RATE = 8000
HOP, WINDOW = 80, 256  # 10 and 32 milliseconds
BANDS = 40
FRAMES = 140  # 1.4 seconds a clip
HARMONICS = 28
KEYWORD = "m a r i s o l".split()


@dataclass(frozen=True)
class Sound:
    """One speech sound: formants in hertz, loudness of voice and of three bands of noise, length in frames."""

    formants: tuple[float, float, float]
    voice: float
    noise: tuple[float, float, float]
    frames: int
    closure: int = 0


_N = (0.0, 0.0, 0.0)
SOUNDS = {
    "a": Sound((730, 1090, 2440), 1.0, _N, 13),
    "e": Sound((530, 1840, 2480), 1.0, _N, 12),
    "i": Sound((270, 2290, 3010), 0.9, _N, 11),
    "o": Sound((570, 840, 2410), 1.0, _N, 13),
    "u": Sound((300, 870, 2240), 0.9, _N, 12),
    "m": Sound((250, 1000, 2200), 0.35, _N, 8),
    "n": Sound((250, 1500, 2500), 0.35, _N, 8),
    "l": Sound((360, 1300, 2700), 0.55, _N, 8),
    "r": Sound((310, 1060, 1380), 0.55, _N, 8),
    "w": Sound((290, 610, 2150), 0.5, _N, 8),
    "s": Sound((300, 1600, 2600), 0.0, (0.0, 0.1, 0.5), 10),
    "sh": Sound((300, 1700, 2500), 0.0, (0.1, 0.5, 0.2), 10),
    "f": Sound((300, 1200, 2300), 0.0, (0.12, 0.12, 0.12), 9),
    "h": Sound((500, 1500, 2500), 0.0, (0.25, 0.15, 0.05), 6),
    "z": Sound((300, 1600, 2600), 0.3, (0.0, 0.1, 0.35), 8),
    "p": Sound((300, 900, 2200), 0.0, (0.4, 0.1, 0.1), 3, closure=6),
    "t": Sound((300, 1700, 2600), 0.0, (0.1, 0.3, 0.6), 3, closure=6),
    "k": Sound((300, 1900, 2300), 0.0, (0.2, 0.6, 0.2), 4, closure=6),
}
_NAMES = sorted(SOUNDS)


def _number(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _choice(generator: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (), generator=generator))


def other_word(generator: torch.Generator) -> list[str]:
    """Return a word that is not the keyword; half of them differ from it in one or two sounds."""
    word = list(KEYWORD)
    while word == KEYWORD:
        kind = _choice(generator, 4)
        if kind == 0:
            word[_choice(generator, len(word))] = _NAMES[_choice(generator, len(_NAMES))]
        elif kind == 1:
            at = _choice(generator, len(word) - 1)
            word[at], word[at + 1] = word[at + 1], word[at]
        else:
            word = [_NAMES[_choice(generator, len(_NAMES))] for _ in range(3 + _choice(generator, 6))]
    return word


def _controls(words: list[list[str]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What the voice does in each frame of each clip."""
    count = len(words)
    formants = torch.full((count, FRAMES, 3), 500.0)
    voice, noise = torch.zeros(count, FRAMES), torch.zeros(count, FRAMES, 3)
    pitch = torch.zeros(count, FRAMES)
    for clip, word in enumerate(words):
        tempo, size = _number(generator, 0.8, 1.2), _number(generator, 0.85, 1.18)
        lengths = [
            (
                round(SOUNDS[s].closure * tempo * _number(generator, 0.8, 1.2)),
                max(2, round(SOUNDS[s].frames * tempo * _number(generator, 0.75, 1.25))),
            )
            for s in word
        ]
        spoken = sum(a + b for a, b in lengths)
        place = _choice(generator, max(1, FRAMES - spoken - 8)) + 4
        for sound, (closure, frames) in zip((SOUNDS[s] for s in word), lengths, strict=True):
            loud = _number(generator, 0.75, 1.25)
            jitter = torch.rand(3, generator=generator) * 0.12 + 0.94
            whole = slice(place, place + closure + frames)
            formants[clip, whole] = torch.tensor(sound.formants) * size * jitter
            sounding = slice(place + closure, place + closure + frames)
            voice[clip, sounding] = sound.voice * loud
            noise[clip, sounding] = torch.tensor(sound.noise) * loud
            place += closure + frames
        base = _number(generator, 90, 250)
        fall, wave = _number(generator, -0.25, 0.1), _number(generator, 0.0, 0.08)
        time = torch.linspace(0, 1, FRAMES)
        turns = _number(generator, 1, 4)
        pitch[clip] = base * (1 + fall * time + wave * torch.sin(2 * math.pi * turns * time))
    return {
        "formants": _smooth(formants, 7),
        "voice": _smooth(voice.unsqueeze(-1), 5).squeeze(-1),
        "noise": _smooth(noise, 3),
        "pitch": pitch,
    }


def _smooth(values: torch.Tensor, width: int) -> torch.Tensor:
    """Sounds run into one another."""
    moved = F.pad(values.transpose(1, 2), (width // 2, width // 2), mode="replicate")
    return F.avg_pool1d(moved, width, stride=1).transpose(1, 2)


def _every_sample(values: torch.Tensor) -> torch.Tensor:
    """(clips, frames, channels) at frame rate to (clips, channels, samples)."""
    return F.interpolate(values.transpose(1, 2), size=FRAMES * HOP, mode="linear", align_corners=False)


def speak(words: list[list[str]], generator: torch.Generator) -> torch.Tensor:
    """Return words as audio, (clips, samples), loudest near 1, without background."""
    control = _controls(words, generator)
    pitch = control["pitch"].unsqueeze(-1)
    harmonics = torch.arange(1, HARMONICS + 1)
    frequency = pitch * harmonics
    envelope = torch.zeros_like(frequency)
    for index, (width, level) in enumerate(((80.0, 1.0), (110.0, 0.6), (160.0, 0.3))):
        centre = control["formants"][..., index : index + 1]
        envelope += level * width**2 / ((frequency - centre) ** 2 + width**2)
    envelope = (envelope + 0.01) * (frequency < RATE / 2 - 150) * control["voice"].unsqueeze(-1)
    phase = torch.cumsum(2 * math.pi * _every_sample(pitch).squeeze(1) / RATE, dim=-1)
    voiced = torch.zeros_like(phase)
    amplitudes = _every_sample(envelope)
    # sin((k + 1) x) from the two before it: a fraction of the cost of so many sines
    before, now, twice = torch.zeros_like(phase), torch.sin(phase), 2 * torch.cos(phase)
    for index in range(HARMONICS):
        voiced += amplitudes[:, index] * now
        before, now = now, twice * now - before
    white = torch.randn(len(words), FRAMES * HOP, generator=generator)
    spectrum = torch.fft.rfft(white)
    hertz = torch.linspace(0, RATE / 2, spectrum.shape[-1])
    gains = _every_sample(control["noise"])
    for index, (low, high) in enumerate(((500, 1500), (1500, 2800), (2800, 4000))):
        voiced += gains[:, index] * torch.fft.irfft(
            spectrum * ((hertz >= low) & (hertz < high)), n=FRAMES * HOP
        )
    return voiced / voiced.abs().amax(dim=-1, keepdim=True).clamp(min=1e-3)


def background(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return coloured noise of unit power, (clips, samples)."""
    spectrum = torch.fft.rfft(torch.randn(count, FRAMES * HOP, generator=generator))
    steep = torch.rand(count, 1, generator=generator) * 1.2
    spectrum = spectrum * torch.arange(1, spectrum.shape[-1] + 1) ** -steep
    noise = torch.fft.irfft(spectrum, n=FRAMES * HOP)
    return noise / noise.pow(2).mean(-1, keepdim=True).sqrt()


def clips(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return audio (clips, samples) in noise, and 1.0 where it holds the keyword.

    Half the clips do. Of the others, half hold a word that is nearly the keyword. The signal-to-noise ratio
    is between 0 and 20 decibels; one clip in three has other voices behind it.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) < 0.5).float()
    words = [list(KEYWORD) if label else other_word(generator) for label in labels.tolist()]
    audio = speak(words, generator)
    behind = torch.arange(0, count, 3)
    babble = speak([other_word(generator) for _ in behind], generator).roll(HOP * 40, dims=-1)
    audio[behind] += babble * (0.1 + 0.3 * torch.rand(len(behind), 1, generator=generator))
    power = audio.pow(2).mean(-1, keepdim=True).sqrt()
    ratio = 20 * torch.rand(count, 1, generator=generator)
    audio = audio + background(count, generator) * power * 10 ** (-ratio / 20)
    loudness = 10 ** (-torch.rand(count, 1, generator=generator))
    return audio / audio.abs().amax(-1, keepdim=True) * loudness, labels


def mel_filters() -> torch.Tensor:
    """Return triangular filters on the mel scale, (BANDS, WINDOW // 2 + 1)."""

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    edges = torch.linspace(mel(60), mel(RATE / 2 - 50), BANDS + 2, dtype=torch.float64)
    hertz = 700 * (10 ** (edges / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rise = (bins - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
    fall = (hertz[2:, None] - bins) / (hertz[2:] - hertz[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp(min=0).float()


def features(audio: torch.Tensor) -> torch.Tensor:
    """Return the log energies of mel bands, (clips, BANDS, frames), about zero mean and unit scale.

    Frame t sees samples 80 t to 80 t + 255 and none after, so that they can be computed as audio arrives.
    """
    spectrum = torch.stft(
        audio, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False, return_complex=True
    )
    energies = mel_filters() @ spectrum.abs().pow(2)
    return ((energies + 1e-5).log() + 2.0) / 3.5
