"""What both ends of a Python call share: parcels, and whether one is at the far end."""
