"""Prompts for measuring generation: questions of many kinds, and texts whose continuation repeats what was said."""

from __future__ import annotations

#: Questions as people ask them, for chat templates.
QUESTIONS: tuple[str, ...] = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me a recipe for a simple vegetable soup.",
    "What are the advantages of trains over planes?",
    "Summarise the story of Romeo and Juliet.",
    "How do I sort a list of dictionaries by a key in Python?",
    "Write a short letter to a landlord about a broken heater.",
    "List five countries in South America and their capitals.",
    "What is the difference between weather and climate?",
    "Explain photosynthesis to a child.",
    "Write a SQL query that counts the orders of each customer.",
    "How can I learn to play the piano as an adult?",
    "Describe the water cycle step by step.",
    "What should I pack for a week of hiking in the mountains?",
    "Write a Python class for a bank account with deposit and withdraw.",
    "Why do we have leap years?",
    "Give three tips for writing a good introduction to an essay.",
    "What does a compiler do?",
    "Tell me about the history of the bicycle.",
    "How does a vaccine protect against a disease?",
)

_ROWS = "\n".join(
    f"- item {n}: width {n * 7 % 13} cm, height {n * 5 % 11} cm, colour {c}"
    for n, c in enumerate(("red", "blue", "green", "white", "black", "grey", "brown", "pink"), 1)
)
_CODE = """class Circle:
    def __init__(self, radius):
        self.radius = radius

    def area(self):
        return 3.14159 * self.radius ** 2

    def scaled(self, factor):
        return Circle(self.radius * factor)


class Square:
    def __init__(self, side):
        self.side = side
"""
#: Prompts whose answers copy or repeat: code with a pattern, lists, edits, several turns.
REPEATING: tuple[str, ...] = (
    f"Repeat this list exactly, without any comment:\n{_ROWS}",
    f"Here is a Python file:\n\n{_CODE}\nWrite the whole file again, with a docstring for each method.",
    f"Turn this list into a Python list of dictionaries with the keys item, width, height and colour:\n{_ROWS}",
    f"Here is a Python file:\n\n{_CODE}\nAdd the methods area and scaled to the class Square, and show the whole file.",
    "Write the multiplication table of 7 from 1 to 20, one line each, as '7 x 1 = 7'.",
    "Write a Python dictionary that maps the numbers from 1 to 30 to their squares.",
)
