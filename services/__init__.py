"""The processes of Tandem and what they share."""
