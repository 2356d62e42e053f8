"""What the commands share: checks of arguments, and how they end."""

import argparse
import math

import torch


class ArgumentError(Exception):
    """Arguments that cannot be used, in a sentence; the program exits with code 2."""


def count(text):
    """Type of an argument: an integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a positive integer")


def natural(text):
    """Type of an argument: an integer of at least 0."""
    return _number(text, int, lambda value: value >= 0, "an integer of at least 0")


def positive(text):
    """Type of an argument: a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a positive number")


def fraction(text):
    """Type of an argument: a number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number(text, kind, fits, description):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"must be {description}, got {text!r}")
    return value


def device(text):
    """Type of an argument: a torch.device that exists here."""
    try:
        torch.empty(0, device=text)
        return torch.device(text)
    except (RuntimeError, AssertionError) as error:  # an assertion: torch without CUDA
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r}: {reason}") from None


def default_device():
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
