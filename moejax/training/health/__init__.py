"""What is watched while a run trains: alarms, values that are not finite, hanging steps, progress, speed."""
