"""Student of a UNet: the structure that was searched, with weights inherited from the teacher."""
