"""A module for each verb; the command line and the library call them. No stage knows another."""
