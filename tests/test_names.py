"""What names say: hundreds of real-world ones, and what must not be read into them."""
# ruff: noqa: E501, RUF001

from __future__ import annotations

import time
from typing import Any, Callable, List, Tuple

import pytest

import refresherr as program

# A path, and below it what it says: kind, title, (year), season and episodes, date, height, ids.
NAMES = """
# Scene and P2P releases
/dl/Breaking.Bad.S05E14.Ozymandias.1080p.BluRay.x264-ROVERS.mkv
    episode Breaking Bad S5E14 1080p
/dl/breaking.bad.s05e14.720p.hdtv.x264-killers.mkv
    episode breaking bad S5E14 720p
/dl/The.Office.US.S03E01.Gay.Witch.Hunt.1080p.WEB-DL.DD5.1.H.264-NTb.mkv
    episode The Office US S3E1 1080p
/dl/Doctor.Who.2005.S13E01.1080p.HEVC.x265-MeGusta.mkv
    episode Doctor Who (2005) S13E1 1080p
/dl/The.Last.of.Us.S01E03.2160p.HMAX.WEB-DL.DDP5.1.Atmos.DV.HDR.H.265-NTb.mkv
    episode The Last of Us S1E3 2160p
/dl/House.of.the.Dragon.S02E01.1080p.10bit.WEBRip.6CH.x265.HEVC-PSA.mkv
    episode House of the Dragon S2E1 1080p
/dl/Chernobyl.S01E01.1.23.45.2160p.UHD.BluRay.x265.10bit.HDR.DTS-HD.MA.5.1-SWTYBLZ.mkv
    episode Chernobyl S1E1 2160p
/dl/Severance.S02E07.Chikhai.Bardo.1080p.ATVP.WEB-DL.DDP5.1.H.264-FLUX.mkv
    episode Severance S2E7 1080p
/dl/Band.of.Brothers.S01E01E02.720p.BluRay.x264-CtrlHD.mkv
    episode Band of Brothers S1E1E2 720p
/dl/Weeds.S03E01-06.DUAL.BDRip.XviD.AC3-HELLYWOOD.avi
    episode Weeds S3E1E2E3E4E5E6
/dl/Breakout.Kings.S02E09-E10.HDTV.x264-ASAP.mkv
    episode Breakout Kings S2E9E10
/dl/Hell.on.Wheels.S02E09.E10.720p.HDTV.x264-EVOLVE.mkv
    episode Hell on Wheels S2E9E10 720p
/dl/Kaamelott.S01E91-E100.FRENCH.DVDRip.avi
    episode Kaamelott S1E91E92E93E94E95E96E97E98E99E100
/dl/Shortland.Street.S22E5363-E5366.HDTV.x264-FiHTV.mkv
    episode Shortland Street S22E5363E5364E5365E5366
/dl/Weeds.S03E01.S03E02.720p.HDTV.X264-DIMENSION.mkv
    episode Weeds S3E1E2 720p
/dl/White.Collar.2x04.2x05.720p.BluRay-FUTV.mkv
    episode White Collar S2E4E5 720p
/dl/Chuck.4x05.HDTV.XviD-LOL.avi
    episode Chuck S4E5
/dl/Twin.Peaks.S01E00.Pilot.1080p.BluRay.mkv
    episode Twin Peaks S1E0 1080p
/dl/1923.S01E01.1080p.WEB.H264-CAKES.mkv
    episode 1923 S1E1 1080p
/dl/1883.S01E10.2160p.WEB.H265-GLHF.mkv
    episode 1883 S1E10 2160p
/dl/24.S01E01.12.00.A.M.720p.mkv
    episode 24 S1E1 720p
/dl/9-1-1.S04E02.Alone.Together.1080p.AMZN.WEB-DL.DDP5.1.H.264.mkv
    episode 9-1-1 S4E2 1080p
/dl/The.100.S01E01.720p.HDTV.x264.mkv
    episode The 100 S1E1 720p
/dl/S.W.A.T.2017.S05E01.1080p.WEB.h264-GOSSIP.mkv
    episode S W A T (2017) S5E1 1080p
/dl/Mr.Robot.S01E01.eps1.0_hellofriend.mov.1080p.WEB-DL.mkv
    episode Mr Robot S1E1 1080p
/dl/Marvels.Agents.of.S.H.I.E.L.D.S01E01.720p.mkv
    episode Marvels Agents of S H I E L D S1E1 720p
/dl/WWE.Monday.Night.Raw.2024.01.08.720p.HDTV.x264-NWCHD.mkv
    episode WWE Monday Night Raw 2024-01-08 720p
/dl/Jeopardy.2023.11.14.720p.HDTV.x264-NTb.mkv
    episode Jeopardy 2023-11-14 720p
/dl/The.Daily.Show.2010.10.11.Johnny.Knoxville.iTouch-MW.mkv
    episode The Daily Show 2010-10-11
/dl/Conan 2011 04 18 Emma Roberts HDTV XviD BFF.avi
    episode Conan 2011-04-18
/dl/Jimmy_Fallon_2018_06_22_Seth_Meyers_720p_HEVC_x265-MeGusta.mkv
    episode Jimmy Fallon 2018-06-22 720p
/dl/heute-show.31.03.2023.German.720p.WEB.h264.mkv
    episode heute-show 2023-03-31 720p
/dl/Tatort.07.04.2024.German.1080p.WEB.mkv
    other Tatort 07 04 2024 German 1080p
/dl/EastEnders.2024.01.05.1080p.iP.WEB-DL.AAC2.0.H.264-RAWR.mkv
    episode EastEnders 2024-01-05 1080p
/dl/2020.NZ.2011.12.02.PDTV.XviD-C4TV.avi
    episode 2020 NZ 2011-12-02
/dl/Planet.Earth.III.S01E01.2160p.iP.WEB-DL.AAC2.0.HLG.H.265.mkv
    episode Planet Earth III S1E1 2160p
/dl/The.Matrix.1999.1080p.BluRay.x264-CiNEFiLE.mkv
    movie The Matrix (1999) 1080p
/dl/Dune.Part.Two.2024.2160p.WEB-DL.DDP5.1.Atmos.DV.HDR.H.265-FLUX.mkv
    movie Dune Part Two (2024) 2160p
/dl/Oppenheimer.2023.IMAX.2160p.BluRay.x265.10bit.DTS-HD.MA.5.1-SWTYBLZ.mkv
    movie Oppenheimer (2023) 2160p
/dl/Blade.Runner.2049.2017.2160p.UHD.BluRay.REMUX.HDR.HEVC.Atmos-EPSiLON.mkv
    movie Blade Runner 2049 (2017) 2160p
/dl/Blade.Runner.1982.The.Final.Cut.4K.Remastered.1080p.BluRay.mkv
    movie Blade Runner (1982) 1080p
/dl/1917.2019.1080p.BluRay.x264-SPARKS.mkv
    movie 1917 (2019) 1080p
/dl/2012.2009.720p.BluRay.x264.mkv
    movie 2012 (2009) 720p
/dl/1984.1984.1080p.BluRay.mkv
    movie 1984 (1984) 1080p
/dl/2001.A.Space.Odyssey.1968.REMASTERED.2160p.mkv
    movie 2001 A Space Odyssey (1968) 2160p
/dl/Wonder.Woman.1984.2020.IMAX.1080p.mkv
    movie Wonder Woman 1984 (2020) 1080p
/dl/1776.1972.EXTENDED.720p.BluRay.X264-AMIABLE.mkv
    movie 1776 (1972) 720p
/dl/World.War.Z.EXTENDED.2013.German.DL.1080p.BluRay.mkv
    movie World War Z (2013) 1080p
/dl/Class.of.1999.1990.German.720p.HDTV.x264-NORETAiL.mkv
    movie Class of 1999 (1990) 720p
/dl/8.2019.GERMAN.720p.BluRay.x264-UNiVERSUM.mkv
    movie 8 (2019) 720p
/dl/300.2006.1080p.BluRay.x264.mkv
    movie 300 (2006) 1080p
/dl/(500).Days.of.Summer.(2009).DTS.1080p.BluRay.x264.mkv
    movie (500) Days of Summer (2009) 1080p
/dl/R.I.P.D.2013.720p.BluRay.x264-SPARKS.mkv
    movie R I P D (2013) 720p
/dl/Open.Season.2.2008.1080p.BluRay.x264.mkv
    movie Open Season 2 (2008) 1080p
/dl/Se7en.1995.2160p.UHD.Blu-ray.Remux.mkv
    movie Se7en (1995) 2160p
/dl/www.Torrenting.com - Heat.1995.720p.X264-DIMENSION.mkv
    movie Heat (1995) 720p
/dl/[TGx] Heat (1995) 1080p.mkv
    movie Heat (1995) 1080p
/dl/Alien.Romulus.2024.1080p.WEBRip.x264.AAC5.1-[YTS.MX].mp4
    movie Alien Romulus (2024) 1080p
/dl/Cars.2.German.DL.720p.BluRay.x264-EmpireHD.mkv
    other Cars 2 German DL 720p
/dl/It.Follows.2014.1080p.BluRay.mkv
    movie It Follows (2014) 1080p
/dl/Uncut.Gems.2019.1080p.NF.WEB-DL.mkv
    movie Uncut Gems (2019) 1080p
/dl/The.Darjeeling.Limited.2007.1080p.mkv
    movie The Darjeeling Limited (2007) 1080p
/dl/Charlottes.Web.2006.1080p.WEB-DL.mkv
    movie Charlottes Web (2006) 1080p
/dl/Complete.Unknown.2016.1080p.mkv
    movie Complete Unknown (2016) 1080p
/dl/Blade.Runner.2049.1080p.BluRay.mkv
    other Blade Runner 2049 1080p
/dl/10x10.2018.1080p.WEB.mkv
    movie 10x10 (2018) 1080p
/dl/Le.Voyage.dans.la.Lune.1902.1080p.mkv
    movie Le Voyage dans la Lune (1902) 1080p
/dl/Film.1920x1080.x264.mkv
    other Film 1080p
/dl/Film.2010.1920x1080.DDP5.1.x264.mkv
    movie Film (2010) 1080p
/dl/Film.2010.1280x720.AAC2.0.x265.mkv
    movie Film (2010) 720p
/dl/Film.2010.3840x1600.mkv
    movie Film (2010) 2160p
/dl/Film.2010.720x576.PAL.mkv
    movie Film (2010) 576p
/dl/Film.2010.640x480.avi
    movie Film (2010) 480p
/dl/Film.2010.2160p.mkv
    movie Film (2010) 2160p
/dl/Film.2010.1080i.HDTV.ts
    movie Film (2010) 1080p
/dl/Film.2010.UHD.BluRay.mkv
    movie Film (2010) 2160p
/dl/Film.2010.[4K].mkv
    movie Film (2010) 2160p
/dl/Film.2010.DVDRip.XviD.avi
    movie Film (2010)
/dl/Film.2010.576p.mkv
    movie Film (2010) 576p
/dl/Film.2010.1080P.HQ.mkv
    movie Film (2010) 1080p

# Sonarr
/tv/Show (2019)/Season 01/Show (2019) - S01E02 - Pilot WEBDL-1080p.mkv
    episode Show (2019) S1E2 1080p
/tv/Show (2019)/Season 1/Show - S01E02 - The One with 1999 Candles Bluray-720p Proper.mkv
    episode Show (2019) S1E2 720p
/tv/Show (2019) {tvdb-123456}/Season 01/Show (2019) - S01E02 - Title [AMZN WEBDL-2160p][DV HDR10][EAC3 Atmos 5.1][h265]-NTb.mkv
    episode Show (2019) S1E2 2160p tvdb-123456
/tv/Show (2019) [tvdbid-123456]/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2 tvdb-123456
/tv/Show (2019) [tvdb-123456]/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2 tvdb-123456
/tv/Show (2019) {imdb-tt0944947}/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2 imdb-tt0944947
/tv/Show (2019) [imdbid-tt0944947]/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2 imdb-tt0944947
/tv/Show (2019) (tmdb-1399)/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2 tmdb-1399
/tv/Show (2019) [tmdbid=1399]/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2 tmdb-1399
/tv/Show (2019) [tt0944947]/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2 imdb-tt0944947
/tv/Show {tmdb-1399} {tvdb-121361} {imdb-tt0944947}/Season 01/Show.S01E02.mkv
    episode Show S1E2 tmdb-1399 tvdb-121361 imdb-tt0944947
/tv/Show (2019) {TVDB-121361}/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2 tvdb-121361
/tv/Show (2019) {tvdb-0}/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2
/tv/Show (2019) {tmdb-None}/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2
/tv/Show (2019) {anidb-42}/Season 01/Show.S01E02.mkv
    episode Show (2019) S1E2
/tv/Show/Season 01/Show - S01E02-E03 - Title + Other.mkv
    episode Show S1E2E3
/tv/Show/Season 01/Show - S01E02-03 - Title + Other HDTV-720p.mkv
    episode Show S1E2E3 720p
/tv/Show/Season 01/Show - S01E02E03 - Title.mkv
    episode Show S1E2E3
/tv/Show/Season 01/Show - S01E02.S01E03 - Title.mkv
    episode Show S1E2E3
/tv/Show/Season 01/Show - S01E02-E03-E04 - Title.mkv
    episode Show S1E2E3E4
/tv/Show/Season 01/Show - S01E02-03-04 - Title.mkv
    episode Show S1E2E3E4
/tv/Show/Season 01/Show - S01E02 - S01E03 - Title.mkv
    episode Show S1E2E3
/tv/Show/Season 01/Show - 1x02 - Title.mkv
    episode Show S1E2
/tv/Show/Season 01/Show - 1x02-1x03 - Title.mkv
    episode Show S1E2E3
/tv/Show/Season 01/Show - 1x02x03 - Title.mkv
    episode Show S1E2E3
/tv/Show/Season 01/Show - 1x02-03 - Title.mkv
    episode Show S1E2E3
/tv/Show/Season 08/Grey's Anatomy - 8x01_02 - Free Falling.mkv
    episode Show S8E1E2
/tv/Show/Season 01/S01E02 - Title - 720p TV.mkv
    episode Show S1E2 720p
/tv/Show/Season 01/1x02.mkv
    episode Show S1E2
/tv/Show/Season 01/s1e2.mkv
    episode Show S1E2
/tv/Show/Season 01/Show S1 E2.mkv
    episode Show S1E2
/tv/Show/Season 01/Show S01.E02.mkv
    episode Show S1E2
/tv/Show/Season 01/Show_S01_E02_Title.mkv
    episode Show S1E2
/tv/Show/Season 01/Show S01EP02.mkv
    episode Show S1E2
/tv/Show/Season 01/Show [S01E02] Title.mkv
    episode Show S1E2
/tv/Show/Season 01/Show (S01E02).mkv
    episode Show S1E2
/tv/Show/Season 01/Show - s01e02v2.mkv
    episode Show S1E2
/tv/Show/Season 01/Show - S01E102.mkv
    episode Show S1E102
/tv/Show/Season 01/Show - S01E1002.mkv
    episode Show S1E1002
/tv/Show/Season 01/Show - S01E02-1080p.mkv
    episode Show S1E2 1080p
/tv/Show/Season 01/Show - S01E02-720p.mkv
    episode Show S1E2 720p
/tv/Show/Season 01/Show - S01E02-10bit.mkv
    episode Show S1E2
/tv/Show/Season 01/Show - S01E02-5.1.mkv
    episode Show S1E2
/tv/Show/Season 01/Show - S01E02-2019.mkv
    episode Show S1E2
/tv/Show/Season 01/Show - S01E02 - 24 Hours.mkv
    episode Show S1E2
/tv/Show/Season 01/Show - S01E02 - E3.mkv
    episode Show S1
/tv/Show/Season 01/Show - S01E02 - 2x4.mkv
    episode Show S1
/tv/Show/Season 01/Show - S01E02 - Part 2 (2001).mkv
    episode Show S1E2
/tv/Show/Season 01/Show - S01E02 - 2001-09-11.mkv
    episode Show S1E2
/tv/Show/Season 01/Show - S01E02.en.srt
    episode Show S1E2
/tv/Show/Season 01/Show - S01E02-thumb.jpg
    episode Show S1E2
/tv/Show/Season 02/Show - S01E02.mkv
    episode Show S1E2
/tv/Show/Show - S01E02 - Title.mkv
    episode Show S1E2
/tv/Show (2019) {tvdb-5}/Show - S01E02 - Title.mkv
    episode Show (2019) S1E2 tvdb-5
/tv/Show (2019)/Show - Season 01/Show - S01E02.mkv
    episode Show (2019) S1E2
/tv/Show (2019) {tvdb-5}/Show Season 1/S01E02.mkv
    episode Show (2019) S1E2 tvdb-5
/tv/Show (2019)/Show.S01.1080p/02 - Title.mkv
    episode Show (2019) S1 1080p
/tv/Show/Season 2024/Show - S2024E05 - Title.mkv
    episode Show S2024E5
/tv/World Series of Poker/Season 2013/World Series of Poker - S2013E15.mkv
    episode World Series of Poker S2013E15
/tv/The Daily Show/Season 29/The Daily Show - 2024-01-05 - Guest WEBDL-720p.mkv
    episode The Daily Show S29 2024-01-05 720p
/tv/The Daily Show (1996)/2024/The Daily Show - 2024-01-05.mkv
    episode The Daily Show 2024-01-05
/tv/News/Season 2024/News.2024.01.05.mkv
    episode News S2024 2024-01-05
/tv/News/Season 2024/News 2024_01_05.mkv
    episode News S2024 2024-01-05
/tv/News/Season 2024/News - 05.01.2024.mkv
    episode News S2024
/tv/News/Season 2024/News - 25.01.2024.mkv
    episode News S2024 2024-01-25
/tv/News/Season 2024/2024-01-05.mkv
    episode News S2024 2024-01-05
/tv/News/Season 2024/News - 2024-13-05.mkv
    episode News S2024
/tv/News/Season 2024/News 1-2.mkv
    episode News S2024
/tv/24/Season 03/24 - S03E04.mkv
    episode 24 S3E4
/tv/1923 (2022)/Season 1/1923 - S01E01 - 1923.mkv
    episode 1923 (2022) S1E1
/tv/1899 (2022)/Season 01/1899.S01E01.mkv
    episode 1899 (2022) S1E1
/tv/The 100 (2014)/Season 1/The 100 - S01E01.mkv
    episode The 100 (2014) S1E1
/tv/Hawaii Five-0 (2010)/Season 1/Hawaii Five-0 - S01E01.mkv
    episode Hawaii Five-0 (2010) S1E1
/tv/The Office (US) (2005)/Season 1/The Office (US) - S01E01.mkv
    episode The Office (US) (2005) S1E1
/tv/Doctor Who (2005)/Specials/Doctor Who - S00E100 - The Doctor's Meditation.mkv
    episode Doctor Who (2005) S0E100
/tv/Show/Season 0/Show - S00E03.mkv
    episode Show S0E3
/tv/Show/Season 00/Show - S00E03.mkv
    episode Show S0E3
/tv/Show/Specials/Show - Christmas.mkv
    episode Show S0
/tv/Show/S01/Show.E02.mkv
    episode Show S1E2
/tv/Show/Season 1/Episode 2.mkv
    episode Show S1E2
/tv/Show/Season 1/E02 - Title.mkv
    episode Show S1E2
/tv/Show/Season 1/Ep. 02.mkv
    episode Show S1E2
/tv/Show/Season 1/Show Season 1 Episode 2 - Title.mkv
    episode Show S1E2
/tv/Show/Show - Season 1, Episode 2.mkv
    episode Show S1E2
/tv/Show/Series 3/Show Series 3 Episode 2.mkv
    episode Show S3E2
/tv/Show/Staffel 2/Show - S02E01.mkv
    episode Show S2E1
/tv/Show/Saison 2/Show - S02E01.mkv
    episode Show S2E1
/tv/Show/Temporada 2/Show - 2x01.mkv
    episode Show S2E1
/tv/Show/Stagione 2/Show - 2x01.mkv
    episode Show S2E1
/tv/Show/Сезон 2/Show - S02E01.mkv
    episode Show S2E1
/tv/Show/第2季/Show - S02E01.mkv
    episode Show S2E1
/tv/Show/Season 2 (2020)/Show - S02E01.mkv
    episode Show S2E1
/tv/Show/Season 2 [1080p]/Show - S02E01.mkv
    episode Show S2E1 1080p
/tv/Show/Season.02/Show - S02E01.mkv
    episode Show S2E1
/tv/Show/season 2/x.mkv
    episode Show S2
/tv/Show (2019-2021)/Season 1/Show - S01E02.mkv
    episode Show (2019) S1E2
/tv/Show (2019-)/Season 1/Show - S01E02.mkv
    episode Show (2019) S1E2
/tv/Show [2019]/Season 1/Show - S01E02.mkv
    episode Show (2019) S1E2
/tv/Show (2019)/Season 01/Show.S01E02.1080p-GRP/show.s01e02.mkv
    episode Show (2019) S1E2 1080p
/tv/Show (2019)/Season 01/Show.S01E02.1080p-GRP/abc123.mkv
    other Show (2019) 1080p
/tv/Show 4K/Season 1/Show - S01E02.mkv
    episode Show S1E2 2160p
/tv 4K/Show/Season 1/Show - S01E02.mkv
    episode Show S1E2 2160p
/tv/Show.Name.2019/Season 1/x.S01E02.mkv
    episode Show Name (2019) S1E2
/tv/Extras (2005)/Season 1/Extras - S01E01.mkv
    episode Extras (2005) S1E1
/tv/Extras/Extras - S01E01.mkv
    episode Extras S1E1
/tv/Show/Season 1/Extras/Show - S01E01 - Making of.mkv
    other Show
/tv/Show/Season 1/Featurettes/Interview.mkv
    other Show
/tv/Show/Season 1/Show - S01E01-trailer.mkv
    other Show

# Radarr
/movies/Film (2010)/Film (2010) Bluray-1080p.mkv
    movie Film (2010) 1080p
/movies/Film (2010)/Film (2010) {imdb-tt1375666} [Bluray-1080p][DTS 5.1][x264]-GRP.mkv
    movie Film (2010) 1080p imdb-tt1375666
/movies/Film (2010) {tmdb-27205}/Film (2010) {tmdb-27205} - {edition-Director's Cut} [WEBDL-2160p].mkv
    movie Film (2010) 2160p tmdb-27205
/movies/Film (2010) [tmdbid-27205]/Film.mkv
    movie Film (2010) tmdb-27205
/movies/Film (2010) {tmdb-27205}/Film (2010) {imdb-tt1375666}.mkv
    movie Film (2010) tmdb-27205 imdb-tt1375666
/movies/Film {tmdb-27205}/x.mkv
    movie Film tmdb-27205
/movies/Film [imdbid-tt1375666].mkv
    movie Film imdb-tt1375666
/movies/Film (2010)/abcdef0123456789.mkv
    movie Film (2010)
/movies/Film (2010)/Film (2010) - 1080p.mkv
    movie Film (2010) 1080p
/movies/Film (2010)/Film (2010) - 2160p.mkv
    movie Film (2010) 2160p
/movies/Film (2010)/Film (2010) - 4K.mkv
    movie Film (2010) 2160p
/movies/Film (2010)/Film (2010) - [Directors Cut].mkv
    movie Film (2010)
/movies/Film (2010)/Film (2010) - pt1.mkv
    other Film (2010)
/movies/Film (2010)/Film (2010) [Version 2].mkv
    movie Film (2010)
/movies/Film (2010)/Film.2010.CD1.avi
    other Film (2010)
/movies/Film (2010)/Film (2010).en.srt
    movie Film (2010)
/movies/Film (2010)/film.mkv
    movie Film (2010)
/movies/Film.2010.1080p.BluRay.x264-GRP/film-grp.mkv
    movie Film (2010) 1080p
/movies/Film.2010.1080p.BluRay.x264-GRP/Film.2010.1080p.BluRay.x264-GRP.mkv
    movie Film (2010) 1080p
/movies/2010/Film.mkv
    other Film
/movies/Best of 2020/Film (2010).mkv
    movie Film (2010)
/movies/Movies 2020/Film.2020.1080p.mkv
    movie Film (2020) 1080p
/movies/Film (2010).mkv
    movie Film (2010)
/movies/(1995) Film.mkv
    other (1995) Film
/movies/Matrix, The (1999)/Matrix, The (1999).mkv
    movie Matrix, The (1999)
/movies/2012 (2009)/2012 (2009).mkv
    movie 2012 (2009)
/movies/Blade Runner 2049 (2017)/Blade Runner 2049.mkv
    movie Blade Runner 2049 (2017)
/movies/1917 (2019)/1917.mkv
    movie 1917 (2019)
/movies/300 (2006)/300.mkv
    movie 300 (2006)
/movies/300 (2006)/300 [1080p].mkv
    movie 300 (2006) 1080p
/movies/21 (2008)/21 (2008).mkv
    movie 21 (2008)
/movies/12 Angry Men (1957)/12 Angry Men.mkv
    movie 12 Angry Men (1957)
/movies/8½ (1963)/8½ (1963).mkv
    movie 8½ (1963)
/movies/[REC] (2007)/[REC] (2007).mkv
    movie [REC] (2007)
/movies/[REC] 2 (2009)/REC.2.2009.mkv
    movie [REC] 2 (2009)
/movies/10x10 (2018)/10x10 (2018) 1080p.mkv
    movie 10x10 (2018) 1080p
/movies/Wonder Woman 1984 (2020)/a.mkv
    movie Wonder Woman 1984 (2020)
/movies/Space - 1999 (1975)/a.mkv
    movie Space - 1999 (1975)
/movies/Mission - Impossible - 2 (2000)/Mission - Impossible - 2 (2000).mkv
    movie Mission - Impossible - 2 (2000)
/movies/Star Wars - Episode 4 (1977)/Star Wars - Episode 4 (1977).mkv
    movie Star Wars - Episode 4 (1977)
/movies/Star.Wars.Episode.1.The.Phantom.Menace.1999.1080p.mkv
    movie Star Wars Episode 1 The Phantom Menace (1999) 1080p
/movies/House (1977) (2009)/a.mkv
    movie House (1977) (2009)
/movies/Film (2010)/Trailers/Film (2010).mkv
    other Film (2010)
/movies/Film (2010)/Featurettes/Making of (2011).mkv
    other Making of (2011)
/movies/Film (2010)/Film (2010)-trailer.mkv
    other Film (2010)
/movies/Film (2010)/Film (2010)-behindthescenes.mkv
    other Film (2010)
/movies/Film (2010)/Extras/01 - Making of.mkv
    other 01 - Making of
/movies/Film (2010)/Behind The Scenes/a.mkv
    other a
/movies/Heat/Heat.mkv
    other Heat
/movies/Heat/Heat.1080p.mkv
    other Heat 1080p
/movies/X (2022)/X (2022).mkv
    movie X (2022)
/movies/Alien³ (1992)/Alien³ (1992).mkv
    movie Alien³ (1992)
/movies/M*A*S*H (1970)/MASH.mkv
    movie M*A*S*H (1970)
/movies/Face+Off (1997)/Face-Off (1997).mkv
    movie Face+Off (1997)
/movies/Film (2010)/BDMV/STREAM/00001.m2ts
    other 00001
/movies/Star Wars - 4K77 (1977)/4K77.mkv
    movie Star Wars - 4K77 (1977)

# CineSync
/lib/CineSync/Shows/Show (2019) {tmdb-1399}/Season 1/Show - S01E02 - Title[1080p]-GRP.mkv
    episode Show (2019) S1E2 1080p tmdb-1399
/lib/CineSync/Shows/Show (2019)/Season 1/Show.Name.S01E02.1080p.WEB-DL.x264-GRP.mkv
    episode Show (2019) S1E2 1080p
/lib/CineSync/4KShows/Show (2019)/Season 1/Show - S01E02 - Title.mkv
    episode Show (2019) S1E2 2160p
/lib/CineSync/Shows/UltraHDRemuxShows/Show (2019) {imdb-tt0944947}/Season 0/Show - S00E02.mkv
    episode Show (2019) S0E2 2160p imdb-tt0944947
/lib/CineSync/Shows/UltraHD/Show (2019) {imdb-tt0944947}/Season 2/Show - S02E02 [Version 2].mkv
    episode Show (2019) S2E2 2160p imdb-tt0944947
/lib/Shows/Show (2019)/Season 1/Show - S01E02 - Title - 1080p.mkv
    episode Show (2019) S1E2 1080p
/lib/Shows/Retro480p/Show (1979)/Season 1/Show - S01E02.mkv
    episode Show (1979) S1E2 480p
/lib/Shows/Show (2019)/Season 1/Show - 2024-01-05 - Title.mkv
    episode Show (2019) S1 2024-01-05
/lib/Shows/Show (2019)/Extras/Show - S01E02.mkv
    other Show
/lib/AnimeShows/Show (2019)/Season 1/[SubsPlease] Show - 12 (1080p) [F00DCAFE].mkv
    episode Show (2019) S1 1080p
/lib/CineSync/Movies/Film (2010)/Film (2010) 1080p.mkv
    movie Film (2010) 1080p
/lib/CineSync/Movies/Film (2010) {tmdb-27205}/Film.2010.1080p.BluRay.x264-GRP.mkv
    movie Film (2010) 1080p tmdb-27205
/lib/4KMovies/Film (2010)/Film.2010.mkv
    movie Film (2010) 2160p
/lib/Movies/4KRemux/Film (2010)/Film.2010.mkv
    movie Film (2010) 2160p
/lib/Movies/4KRemux/Film (2010)/Film.2010.1080p.mkv
    movie Film (2010) 1080p
/lib/CineSync/Movie Collections/Alien Collection {tmdb-8091}/Alien (1979)/Alien (1979) 1080p.mkv
    movie Alien (1979) 1080p
/lib/CineSync/Movie Collections/Alien Collection {tmdb-8091}/Aliens (1986) {tmdb-679}/Aliens (1986).mkv
    movie Aliens (1986) tmdb-679
/lib/CineSync/Sports/Formula 1/Season 2024/Bahrain Grand Prix/Formula.1.2024.Bahrain.Grand.Prix.1080p.mkv
    other Formula 1 1080p
/lib/CineSync/Sports/Formula 1/Season 2024/Formula1.2024.Round01.Race.mkv
    other Formula 1
/lib/CineSync/Sports/UFC/UFC.300.2024.1080p.mkv
    other UFC 300 (2024) 1080p
/lib/tv/Sports/WWE Raw/Season 32/WWE Raw - S32E02.mkv
    episode WWE Raw S32E2
/lib/Shows/Star Trek - The Next Generation (1987)/Season 1/Star.Trek.TNG.S01E01-E02.mkv
    episode Star Trek - The Next Generation (1987) S1E1E2
/lib/Movies/Who Framed Roger Rabbit (1988)/x.mkv
    movie Who Framed Roger Rabbit (1988)
/lib/Movies/MxAxSxH (1970)/x.mkv
    movie MxAxSxH (1970)

# Anime
/anime/Show/Season 1/[SubsPlease] Show - 12 (1080p) [F00DCAFE].mkv
    episode Show S1 1080p
/anime/Show/Season 02/[Erai-raws] Show 2nd Season - 05 [1080p][Multiple Subtitle].mkv
    episode Show S2 1080p
/anime/One Piece (1999)/Season 21/[HorribleSubs] One Piece - 1015 [720p].mkv
    episode One Piece (1999) S21 720p
/anime/One Piece/[HorribleSubs] One Piece - 1015 [720p].mkv
    other One Piece - 1015 720p
/anime/Show (2019)/[Group] Show - 12v2 [1080p].mkv
    other Show (2019) 1080p
/anime/Show (2019)/[Group]_Show_-_12_[1080p].mkv
    other Show (2019) 1080p
/anime/Show (2019)/12 - Title.mkv
    other Show (2019)
/anime/Show (2019)/12.mkv
    other Show (2019)
/anime/Show (2019)/Show - 012 - Title.mkv
    other Show (2019)
/anime/Show (2019)/Show E12.mkv
    other Show (2019)
/anime/Show (2019)/Show - Episode 12.mkv
    other Show (2019)
/anime/Show/Season 1/Show - S01E12 - 012 - Title [HDTV-1080p][10bit][x265][AAC 2.0]-Group.mkv
    episode Show S1E12 1080p
/anime/[SubsPlease] Show (2019) - 12 (1080p) [F00DCAFE].mkv
    other Show (2019) 1080p
/anime/[SubsPlease] Show - S2E05 (1080p) [F00DCAFE].mkv
    episode Show S2E5 1080p
/anime/[Judas] Jujutsu Kaisen - S02E01.mkv
    episode Jujutsu Kaisen S2E1
/anime/[MTBB] Kimi no Na wa. (2016) v2 [97681524].mkv
    movie Kimi no Na wa. (2016)
/anime/[sam] Toward the Terra (1980) [BD 1080p TrueHD].mkv
    movie Toward the Terra (1980) 1080p
/anime/5 Centimeters per Second (2007)/[Arid] 5 Centimeters per Second (BDRip 1920x1080 Hi10 FLAC) [FD8B6FF2].mkv
    movie 5 Centimeters per Second (2007) 1080p
/anime/[Arid] 5 Centimeters per Second (BDRip 1920x1080 Hi10 FLAC) [FD8B6FF2].mkv
    other 5 Centimeters per Second 1080p
/anime/Evangelion - 1.11 (2007)/a.mkv
    movie Evangelion - 1.11 (2007)
/anime/86 (2021)/Season 1/86 - S01E01.mkv
    episode 86 (2021) S1E1
/anime/Show/Season 1/[Group] Show 01 (BD 1280x720 x264 AACx2).mkv
    episode Show S1 720p
/anime/Show/Season 1/[Group] Show - 01 [1920x1080 x264 FLACx2].mkv
    episode Show S1 1080p

# Other scripts
/tv/進撃の巨人 (2013) {tvdb-267440}/Season 1/進撃の巨人 - S01E01 - 二千年後の君へ.mkv
    episode 進撃の巨人 (2013) S1E1 tvdb-267440
/tv/오징어 게임 (2021)/Season 1/오징어 게임 - S01E01 - 무궁화 꽃이 피던 날.mkv
    episode 오징어 게임 (2021) S1E1
/tv/三体 (2023)/第1季/三体.S01E05.2160p.WEB-DL.mkv
    episode 三体 (2023) S1E5 2160p
/tv/Кухня (2012)/Сезон 1/Кухня - S01E01.mkv
    episode Кухня (2012) S1E1
/tv/Мастер и Маргарита/Сезон 1/s01e03.avi
    episode Мастер и Маргарита S1E3
/movies/千と千尋の神隠し (2001)/千と千尋の神隠し (2001) 1080p.mkv
    movie 千と千尋の神隠し (2001) 1080p
/movies/기생충 (2019) {tmdb-496243}/기생충.2019.1080p.mkv
    movie 기생충 (2019) 1080p tmdb-496243
/movies/Иди и смотри (1985)/Иди.и.смотри.1985.720p.mkv
    movie Иди и смотри (1985) 720p
/movies/Иди.и.смотри.1985.720p.mkv
    movie Иди и смотри (1985) 720p
/movies/Le Fabuleux Destin d'Amélie Poulain (2001)/a.mkv
    movie Le Fabuleux Destin d'Amélie Poulain (2001)
/movies/Ο Θίασος (1975)/a.mkv
    movie Ο Θίασος (1975)
/movies/لورنس العرب (1962)/a.mkv
    movie لورنس العرب (1962)
/movies/लगान (2001)/लगान (2001).mkv
    movie लगान (2001)
/movies/ฉลาดเกมส์โกง (2017)/a.mkv
    movie ฉลาดเกมส์โกง (2017)
/movies/İtirazım Var (2014)/İtirazım.Var.2014.1080p.mkv
    movie İtirazım Var (2014) 1080p

# Oddities
/x/readme
    other readme
x.mkv
    other x
/
    other
/x/
    other x
/tv/Show/Season 1/.mkv
    episode Show S1
/tv/Show/Season 1/....mkv
    episode Show S1
/movies/Film (2010)/[1080p].mkv
    movie Film (2010) 1080p
/movies/[1080p].mkv
    other [1080p] 1080p
/movies/(2010).mkv
    other (2010)
/movies/1080p.mkv
    other 1080p 1080p
/Season 1/x.mkv
    episode S1
/tv/Mr. Robot/Season 1/Mr. Robot S01E02
    episode Mr. Robot S1E2
/tv/Show/Season 1/Show.S01E02.1080p.WEB-DL
    episode Show S1E2 1080p
/dl/Film.2010
    movie Film (2010)
/dl/The.Film.2010.1080p.x264-GRP
    movie The Film (2010) 1080p
/movies/Film (2010)/cops01e02.mkv
    movie Film (2010)
/movies/Apollo 13 (1995)/Apollo 13.mkv
    movie Apollo 13 (1995)
/movies/Apollo 13 (1995)/Apollo - 13.mkv
    other Apollo 13 (1995)
/movies/Alien Collection (1979-2017)/Alien (1979).mkv
    movie Alien (1979)
/tv/AHS (2011)/Season 1 - Murder House/AHS - S01E02.mkv
    episode AHS (2011) S1E2
/movies/Series 7 - The Contenders (2001)/Series.7.mkv
    movie Series 7 - The Contenders (2001)
/movies/Film (2010)/Film (2010) - part1.mkv
    other Film (2010)
/movies/Film (2010)/Film - Part 1.mkv
    other Film (2010)
/movies/Film (2010)/Film.2010.CD1.XviD-GRP.avi
    other Film (2010)
/movies/Film (2010)/film.sample.mkv
    other Film (2010)
/tv/Show/Season 1/Show.S01E02.Part1.720p.mkv
    episode Show S1E2 720p
/tv/Show/Season 1/Show - S01E10-S02E01.mkv
    episode Show S1
/tv/Show/Season 1/Show - S01E05-E03.mkv
    episode Show S1
/anime/Show/Season 2/[SubsPlease] Show S2 - 05 (1080p).mkv
    episode Show S2 1080p

# Custom formats
/tv/Show (2019)/S01/Show.2019.S01E02.Title.1080p.NF.WEB-DL.mkv
    episode Show (2019) S1E2 1080p
/tv/Show (2019)/S01/S01E02.mkv
    episode Show (2019) S1E2
/tv/Show (2019)/Season 1/1x02 - Title [1080p].mkv
    episode Show (2019) S1E2 1080p
/tv/Show (2019)/Season 01/Show (2019) - 1x02 - Title.mkv
    episode Show (2019) S1E2
/tv/S/Show (2019)/Season 01/Show - S01E02.mkv
    episode Show (2019) S1E2
/tv/Show - 2019/Season 01/Show - S01E02.mkv
    episode Show (2019) S1E2
/tv/Show (2019) - The Subtitle/Season 01/Show - S01E02.mkv
    episode Show (2019) S1E2
/tv/Show, The (2019)/Season 01/Show, The - S01E02.mkv
    episode Show, The (2019) S1E2
/tv/Marvel's Agents of S.H.I.E.L.D. (2013)/Season 01/x.S01E02.mkv
    episode Marvel's Agents of S.H.I.E.L.D. (2013) S1E2
/tv/Tom Clancy's Jack Ryan (2018) {tmdb-73375}/Season 1/Tom.Clancys.Jack.Ryan.S01E02.mkv
    episode Tom Clancy's Jack Ryan (2018) S1E2 tmdb-73375
/tv/Law & Order - Special Victims Unit (1999)/Season 25/Law & Order SVU - S25E01.mkv
    episode Law & Order - Special Victims Unit (1999) S25E1
/tv/9-1-1 (2018)/Season 1/9-1-1 - S01E01.mkv
    episode 9-1-1 (2018) S1E1
/tv/11.22.63 (2016)/Season 1/11.22.63 - S01E01.mkv
    episode 11.22.63 (2016) S1E1
/tv/Room 104 (2017)/Season 1/Room 104 - 1x04.mkv
    episode Room 104 (2017) S1E4
/tv/Warehouse 13 (2009)/Season 2/Warehouse 13 - S02E13.mkv
    episode Warehouse 13 (2009) S2E13
/tv/Babylon 5 (1994)/Season 5/Babylon 5 - 5x05.mkv
    episode Babylon 5 (1994) S5E5
/tv/Beverly Hills, 90210 (1990)/Season 1/Beverly Hills 90210 S01E01.mkv
    episode Beverly Hills, 90210 (1990) S1E1
/tv/The 4400 (2004)/Season 1/The.4400.S01E01.mkv
    episode The 4400 (2004) S1E1
/tv/seaQuest DSV (1993)/Season 1/seaQuest.2032.S01E01.mkv
    episode seaQuest DSV (1993) S1
/tv/UFO (1970)/Season 1/UFO.S01E01.576p.BluRay.mkv
    episode UFO (1970) S1E1 576p
/tv/Dark (2017)/Season 1/Dark.S01E01.GERMAN.1080p.NF.mkv
    episode Dark (2017) S1E1 1080p
/tv/Die Sendung mit der Maus (1971)/Season 2024/Die Sendung mit der Maus - 2024-03-10.mkv
    episode Die Sendung mit der Maus (1971) S2024 2024-03-10
/tv/Tagesschau (1952)/Season 2024/Tagesschau.13.03.2024.mkv
    episode Tagesschau (1952) S2024 2024-03-13
/tv/Law & Order (1990)/Staffel 01/Law & Order - S01E01.mkv
    episode Law & Order (1990) S1E1
/tv/Show/Season 100/Show - S100E01.mkv
    episode Show S100E1
/tv/Show/Season 1/Show - S01 E01 - E02.mkv
    episode Show S1E1E2
/tv/Show/Season 1/Show - S01E01 & E02.mkv
    episode Show S1E1E2
/tv/Show/Season 1/Show - S01E01+E02.mkv
    episode Show S1E1E2
/tv/Show/Season 1/Show.S01E01-E02-E03.1080p.mkv
    episode Show S1E1E2E3 1080p
/tv/Show/Season 1/Show - S1E1E2.mkv
    episode Show S1E1E2
/tv/Show/Season 1/Show - S01E01_E02.mkv
    episode Show S1E1E2
/tv/Show/Season 1/Show - s01e01-e02 - x.mkv
    episode Show S1E1E2
/tv/Show/Season 1/Show - 1x01-1x02-1x03.mkv
    episode Show S1E1E2E3
/tv/Show/Season 1/Show - 1x01 1x02.mkv
    episode Show S1E1E2
/tv/Show/Season 1/Show - 1x01-720p.mkv
    episode Show S1E1 720p
/tv/Show/Season 1/Show - 01x01.mkv
    episode Show S1E1
/tv/Show/Season 1/Show - 1X01.mkv
    episode Show S1E1
/tv/Show/Season 1/Show - 1x1.mkv
    episode Show S1
/tv/Show/Season 1/Show 1920x1080.mkv
    episode Show S1 1080p
/tv/Show/Season 1/Show FLACx264.mkv
    episode Show S1
/tv/Show/Season 1/Show DDP5.1x265.mkv
    episode Show S1
/tv/Show/Season 1/Show H.264 10bit 5.1.mkv
    episode Show S1
/tv/Show/Season 1/Cops01E02.mkv
    episode Show S1
/tv/Show/Season 1/Show - SE01.mkv
    episode Show S1
/tv/Show/Season 1/Show - S01.mkv
    episode Show S1
/tv/Show/Season 1/Show - S01E.mkv
    episode Show S1
/tv/Show/Season 1/Show - 102.mkv
    episode Show S1
/tv/Show/Season 1/Show - S01E20240105.mkv
    episode Show S1
/tv/Show/Season 1/Show - S20240105.mkv
    episode Show S1
/movies/Film (2010) {edition-Director's Cut}/Film (2010) {edition-Director's Cut}.mkv
    movie Film (2010)
/movies/Film (2010) - Director's Cut/Film.mkv
    movie Film (2010)
/movies/Film (2010)/Film (2010) - 1080p BluRay x264 DTS-HD MA 5.1.mkv
    movie Film (2010) 1080p
/movies/Film - Sub (2010)/Film - Sub (2010) [imdb-tt1375666][1080p].mkv
    movie Film - Sub (2010) 1080p imdb-tt1375666
/movies/Film (2010) [1080p] [BluRay] [5.1] [YTS.MX]/Film.2010.1080p.BluRay.x264.AAC5.1-[YTS.MX].mp4
    movie Film (2010) 1080p
/movies/F/Film (2010)/Film (2010).mkv
    movie Film (2010)
/movies/Film (1080p BluRay) (2010)/a.mkv
    movie Film (2010) 1080p
/movies/Film (2010) (1080p BluRay x265 10bit Tigole)/Film (2010) (1080p BluRay x265 10bit Tigole).mkv
    movie Film (2010) 1080p
/movies/Film 2010 1080p/Film 2010 1080p.mkv
    movie Film (2010) 1080p
/movies/The Movie (US) (2010)/a.mkv
    movie The Movie (US) (2010)
/movies/Dr. Strangelove or - How I Learned to Stop Worrying (1964)/a.mkv
    movie Dr. Strangelove or - How I Learned to Stop Worrying (1964)
/movies/E.T. the Extra-Terrestrial (1982)/a.mkv
    movie E.T. the Extra-Terrestrial (1982)
/movies/Romeo + Juliet (1996)/Romeo.+.Juliet.1996.mkv
    movie Romeo + Juliet (1996)
/movies/What If... (2013)/a.mkv
    movie What If... (2013)
/movies/tick, tick... BOOM! (2021)/a.mkv
    movie tick, tick... BOOM! (2021)
/movies/(500) Days of Summer (2009)/(500) Days of Summer (2009).mkv
    movie (500) Days of Summer (2009)
/movies/#Alive (2020)/a.mkv
    movie #Alive (2020)
/movies/Death Race 2000 (1975)/Death.Race.2000.1975.mkv
    movie Death Race 2000 (1975)
/movies/Fantasia 2000 (1999)/Fantasia 2000 (1999).mkv
    movie Fantasia 2000 (1999)
/movies/The Wolf of Wall Street (2013) [2160p] [4K]/a.mkv
    movie The Wolf of Wall Street (2013) 2160p
/movies/1408 (2007)/1408.2007.mkv
    movie 1408 (2007)
/movies/Movie 43 (2013)/Movie 43.mkv
    movie Movie 43 (2013)
/movies/District 9 (2009)/District.9.2009.mkv
    movie District 9 (2009)
/movies/Seven Samurai (1954)/Shichinin no samurai - 1954.mkv
    movie Seven Samurai (1954)
/movies/U-571 (2000)/U-571.2000.mkv
    movie U-571 (2000)
/movies/Ocean's Eleven (1960)/x.mkv
    movie Ocean's Eleven (1960)
/movies/Ocean's Eleven (2001)/x.mkv
    movie Ocean's Eleven (2001)
"""


def tell(path: str) -> str:
    """Return what a path says, as the table above writes it."""
    work = program.parse_work(path)
    words = [work.kind, work.title, f"({work.year})" if work.year else ""]
    season = "" if work.season is None else f"S{work.season}"
    words += [season + "".join(f"E{number}" for number in work.episodes), work.date]
    words += [f"{work.resolution}p" if work.resolution else ""]
    words += [f"{database}-{number}" for database, number in work.ids.items()]
    return " ".join(word for word in words if word)


def table() -> List[Tuple[str, str]]:
    lines = [line for line in NAMES.splitlines() if line and not line.startswith("#")]
    return [(path, said.strip()) for path, said in zip(lines[::2], lines[1::2])]


@pytest.mark.parametrize(("path", "said"), table())
def test_parse_work(path: str, said: str) -> None:
    assert tell(path) == said


def test_the_table_is_complete() -> None:
    rows = table()
    assert len(rows) == len(dict(rows)) > 350
    assert all(path.strip() == path and said.split()[0] in KINDS for path, said in rows)


KINDS = {"episode", "movie", "other"}


@pytest.mark.parametrize(
    ("path", "media"),
    [
        ("/tv/Show (2019)/Season 1/x.S01E02.mkv", ("episode", "Show (2019)", 1, (2,))),
        ("/tv/Show/Season 1/Show - 2024-01-05.mkv", ("episode", "Show", 1, ())),
        ("/m/Film (2010) {tmdb-1}/x.mkv", ("movie", "Film (2010)", None, ())),
        ("/m/Film/x.mkv", ("other", "x", None, ())),
    ],
)
def test_media_is_the_short_form(path: str, media: Tuple[Any, ...]) -> None:
    assert tuple(program.parse_media(path)) == media


@pytest.mark.parametrize(
    "path", ["", "/", "//", "a", "/a/", ".mkv", "\udcff/\udcff.S01E02.mkv", "\n/\0"]
)
def test_any_text_is_a_path(path: str) -> None:
    assert program.parse_work(path).kind in KINDS
    assert isinstance(program.normalise_title(path), str)


@pytest.mark.parametrize(
    ("name", "season"),
    [
        ("Season 1", 1),
        ("season 01", 1),
        ("Season 0", 0),
        ("Season 2024", 2024),
        ("Season.03", 3),
        ("S03", 3),
        ("Specials", 0),
        ("SPECIALS", 0),
        ("Staffel 4", 4),
        ("Säsong 5", 5),
        ("Сезон 6", 6),
        ("第7季", 7),
        ("Season 8 (2020)", 8),
        ("Season 9 [1080p]", 9),
        ("Season 10 - The End", 10),
        ("Season", None),
        ("Season One", None),
        ("Seasons 1-3", None),
        ("Open Season 2", None),
        ("Show - Season 1", None),
        ("Series 7 - The Contenders (2001)", None),
        ("S.W.A.T.", None),
        ("S1m0ne", None),
        ("1", None),
        ("2024", None),
        ("Extras", None),
        ("", None),
    ],
)
def test_parse_season_folder(name: str, season: int) -> None:
    assert program.parse_season_folder(name) == season


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("a.mkv", True),
        ("a.MKV", True),
        ("a.b.mp4", True),
        ("a.m2ts", True),
        ("/a.b/c.ts", True),
        ("a.srt", False),
        ("a.strm", False),
        ("a.nfo", False),
        ("a.mkv.part", False),
        ("mkv", False),
        (".mkv", False),
        ("a.mkv/b", False),
        ("", False),
    ],
)
def test_is_video(name: str, answer: bool) -> None:
    assert program.is_video(name) is answer


SAME = """
Spider-Man: Across the Spider-Verse | Spider-Man - Across the Spider-Verse | Spider-Man- Across the Spider-Verse | Spider Man Across the Spider Verse
Fast & Furious | Fast and Furious | FAST AND FURIOUS
M*A*S*H | MxAxSxH
What If...? | What If... | What If | What If...!
Grey's Anatomy | Grey’s Anatomy | Greys Anatomy | Grey`s Anatomy
S.W.A.T. | S.W.A.T | S W A T | SWAT
Marvel's Agents of S.H.I.E.L.D. | Marvels Agents of S H I E L D | Marvels Agents of SHIELD
The Matrix | Matrix, The | the  matrix
An American Tail | American Tail, An
Amélie | Amelie | Ame\u0301lie
Bjørn | Bjorn
Straße | STRASSE
Łódź | Lodz
Ёлки | Елки
Ο Θίασος | Ο ΘΙΑΣΟΣ
İtirazım Var | Itirazim Var
Alien³ | Alien 3
8½ | 8 1/2
[REC] 2 | REC 2 | [REC]²
Face/Off | Face+Off | Face-Off | Face Off
Dr. Strangelove or: How I Learned | Dr Strangelove or - How I Learned
Mr. Robot | Mr Robot
WALL·E | WALL-E
Ｒｅ：ゼロ | Re ゼロ
がんばれ | か\u3099んばれ
오징어 게임 | \u110b\u1169징어 게임
"Show" | Show | “Show” | «Show»
Airplane! | Airplane
"""
OTHER = """
Alien | Aliens | Alien 3
Show | Show 2 | Show II | The Show | Show US
It | It Follows | I.T.
Us | U.S. | U.S. Marshals
The Thing | Thing
がんばれ | かんばれ
май | маи
बाल | बल | बिल
千と千尋の神隠し | 千と千尋
#Alive | Alive
+1 | 1
K-On! | K-On!!
9-1-1 | 9-1-1: Lone Star | 911
Ocean's Eleven | Ocean's Twelve
Seven | Se7en
X | X2 | X-Men
? | ! | *
"""


def titles(text: str) -> List[List[str]]:
    return [line.split(" | ") for line in text.strip().splitlines()]


@pytest.mark.parametrize("spellings", titles(SAME))
def test_spellings_of_a_title_are_equal(spellings: List[str]) -> None:
    assert len({program.normalise_title(title) for title in spellings}) == 1


@pytest.mark.parametrize("works", titles(OTHER))
def test_different_titles_stay_different(works: List[str]) -> None:
    assert len({program.normalise_title(title) for title in works}) == len(works)


@pytest.mark.parametrize(
    "title", [title for line in titles(SAME) + titles(OTHER) for title in line]
)
def test_normalising_again_changes_nothing(title: str) -> None:
    once = program.normalise_title(title)
    assert once
    assert program.normalise_title(once) == once


# What is repeated until a name has 10,000 characters.
HOSTILE = (
    "[|{|(| |a|1|-|.|_|!|'|*|é|x| - | - 1|e1|1x|1x01-|a.|[a]|{a}|(a|. |a b |2010.|"
    "(2010)|s1e1|S1 |s01e01e02|s1 - e1 |season 1 |, the|tmdb-|tt1|www.|1080x|1080p.|"
    "4k.|4kmovies|x264 |part1-|cd|第|extras/|/|2024-|2024.01."
)


def best_time(work: Callable[[str], object], path: str) -> float:
    """Return the processor seconds that a path takes, at best."""
    times = []
    for _ in range(3):
        program._parse_title.cache_clear()
        start = time.process_time()
        work(path)
        times.append(time.process_time() - start)
    return min(times)


def scan(path: str) -> List[str]:
    """Look at each character once."""
    return [character for character in path if character.isalnum()]


@pytest.mark.parametrize(
    "frame", ["{}", "/tv/{}/x.mkv", "/tv/Show/Season 1/S01E01{}.mkv", "/m/Film ({}"]
)
def test_the_worst_names_take_linear_time(frame: str) -> None:
    usual = best_time(scan, "a" * 10000)
    slow = {}
    for unit in HOSTILE.split("|"):
        path = frame.format((unit * 10000)[:10000])
        for work in (program.parse_work, program.normalise_title):
            slow[unit, work.__name__] = best_time(work, path) / usual
    assert {case: ratio for case, ratio in slow.items() if ratio > 100} == {}
