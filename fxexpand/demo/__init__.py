"""The demo: SmallNet on handwritten digits, trained compact and expanded, contracted, saved and loaded back."""
